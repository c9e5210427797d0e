"""Ids of turns → rows with labels. This is where parity, coverage and stop are established, on ids.

    prompt        response                    added                response
    1 20 21 22    31 32 2 13                  20 23 22             33 2
    − −  −  −     31 32 2 −     (13: "\\n")   −  −  −              33 2

Parity of a later turn: its whole prompt must tokenise to exactly the row so far. That holds, joint by joint, where `added`
begins at a safe joint (see `tokenizer.py`) and the turn before it is `joined` (see `ids.py`). Where it is not shown
that way, the whole prompt is tokenised and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import MaskingError
from sft_plugins.masking.checks import first_missing
from sft_plugins.masking.encoding.origins import Origin, count_origins
from sft_plugins.masking.options import MaskingOptions
from sft_plugins.masking.turns.ids import TurnIds
from sft_plugins.masking.turns.masked import MaskedExample
from sft_plugins.masking.turns.reasoning import first_difference
from sft_plugins.masking.turns.stop_tokens import StopTokens
from sft_plugins.masking.turns.tokenizer import TextTokenizer
from sft_plugins.masking.turns.turns import Turn, history_rewrite, special_token_error


@dataclass
class Row:
    """A row in the making: ids so far, the supervised spans `[start, end)` in them, and the turns they belong to."""

    input_ids: list[int]
    repeated: int
    exact: bool  # the ids are known to stand for the very bytes of the last turn's prompt and response
    spans: list[tuple[int, int]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)  # ids the template adds after the last stop token

    @property
    def origin(self) -> Origin:
        last = self.turns[-1]
        contents = last.conversation.contents[: last.index + 1]
        return Origin(contents, last.prompt + last.response if self.exact else None)

    def masked(self, ids: np.ndarray, labels: np.ndarray, role_tokens: Mapping[str, int]) -> MaskedExample:
        return MaskedExample(
            ids,
            labels,
            role_tokens=role_tokens,
            repeated_tokens=self.repeated,
            turn_ends=[end for _, end in self.spans],
            modes=[turn.mode for turn in self.turns],
            changes=[turn.changes for turn in self.turns],
            unread=[key for turn in self.turns for key in turn.unread],
        )


@dataclass(frozen=True)
class Assembler:
    """Turns → masked rows, with what is known of the tokenizer."""

    text: TextTokenizer
    known: StopTokens
    options: MaskingOptions
    _behind: dict[tuple[int, ...], tuple[str, bool]] = field(default_factory=dict)

    def masked(self, rows: list[Row]) -> list[MaskedExample]:
        """`rows` with labels, and their tokens counted by origin: views of arrays of all of them, in which that is one pass."""
        bounds = [*accumulate((len(row.input_ids) for row in rows), initial=0)]
        ids = np.fromiter(chain.from_iterable(row.input_ids for row in rows), np.int32, bounds[-1])
        labels = np.full_like(ids, IGNORE_INDEX)
        for row, first in zip(rows, bounds, strict=False):
            for start, end in row.spans:
                labels[first + start : first + end] = ids[first + start : first + end]
        counted = count_origins([row.origin for row in rows], ids, labels != IGNORE_INDEX, bounds, self.text.pieces)
        return [
            row.masked(ids[start:end], labels[start:end], role_tokens)
            for row, (start, end), role_tokens in zip(rows, pairwise(bounds), counted, strict=True)
        ]

    def rows(self, turns: list[Turn], ids: list[TurnIds]) -> Iterator[Row]:
        """The rows of one plan, each with one or more of its supervised turns.

        Raises:
            MaskingError: `boundary`, `content_lost`, `missing_stop`, `history_rewrite`, and of a pair also `no_prompt`,
                `empty_response`, `special_token_in_content`.
        """
        row: Row | None = None
        before_joined = False
        for turn, own in zip(turns, ids, strict=True):
            prompt, exact = own.prompt, own.exact
            if row is not None and turn.added is not None:
                by_joint = before_joined and not turn.at_stop and self.text.is_safe_joint(turn.added)
                following = row.pending + own.prompt if by_joint else self._following(row, turn)
                if following is not None:
                    self._end_by_header(row, following)
                    row.input_ids += following
                    row.exact &= exact and by_joint
                    self._append_response(row, turn, own)
                    before_joined = own.joined
                    continue
                if self.options.on_history_rewrite == "raise":
                    raise history_rewrite(turn.index, "tokens merge across the turns")
                prompt, exact = self.text.encode([turn.prompt])[0], False
            repeated = 0
            if row is not None:
                yield self._finished(row)
                repeated = min(len(row.input_ids), len(prompt))
            row = Row(list(prompt), repeated, exact=exact)
            self._append_response(row, turn, own)
            before_joined = own.joined
        if row is not None:
            yield self._finished(row)

    def _following(self, row: Row, turn: Turn) -> list[int] | None:
        """Ids by which the row grows to the prompt of `turn`; None where its tokens merge with those of the row."""
        whole = self.text.encode([turn.prompt])[0]
        so_far = row.input_ids if turn.at_stop else row.input_ids + row.pending
        return whole[len(row.input_ids) :] if whole[: len(so_far)] == so_far else None

    def _append_response(self, row: Row, turn: Turn, own: TurnIds) -> None:
        response = own.response
        if turn.plain:
            response = self._ended(row.input_ids, turn, response)
        end = len(response) if turn.plain else self._supervised_length(turn, own)
        start = len(row.input_ids)
        row.spans.append((start, start + end))
        row.input_ids += response[:end]
        row.pending = response[end:]
        row.turns.append(turn)

    def _supervised_length(self, turn: Turn, own: TurnIds) -> int:
        """How many ids of the response carry loss: up to the first stop token behind all of the turn's text.

        All of them where the template puts no stop token into the turn; `_finished` then looks at what follows.
        """
        response = own.response
        ends = self._stops(response) or [len(response)]
        # Behind the right one stands nothing but tokens of the template; a part of the turn may end on a stop of its own.
        bare = [end for end in ends if not self._what_follows(response[end:])[1]]
        for end in bare or ends:
            following, _ = self._what_follows(response[end:])
            if own.exact and turn.response.endswith(following):
                decoded = turn.response[: len(turn.response) - len(following)]
            else:
                decoded = self.text.decode(response[:end])
            if not turn.response.startswith(decoded):
                # A tokenizer that normalises Unicode gives other characters back; then the turn is compared as a whole.
                if not self.text.decodes_to(response, turn.response):
                    raise self._boundary_error(turn, response[:end])
                decoded = turn.response
            if first_missing(decoded, turn.message) is None:
                return end
        if (missing := first_missing(turn.response, turn.message)) is not None:
            raise MaskingError(
                f"{turn.where}: the chat template does not render {missing[:60]!r} of the data.",
                code="content_lost",
                remedy="The template drops or rewrites this part (reasoning, tool calls, a list of parts?). Pass a "
                "`chat_template` that renders it, or take it out of the data.",
            )
        raise self._missing_stop(turn, f"the last of its text comes after its last stop token: {turn.response[-60:]!r}")

    def _ended(self, prompt: list[int], turn: Turn, response: list[int]) -> list[int]:
        """The response of a pair, which ends on one stop token: the one its text ends with, or EOS appended.

        prompt "2 + 2 ="   response " 4"      →      1 29 33 29 46 | 41 2      labels  − − − − − 41 2
        """
        if not prompt:
            raise MaskingError(
                "the prompt is empty and the tokenizer puts no BOS there, so nothing precedes the response.",
                code="no_prompt",
                remedy="Give a prompt: the first token of a document cannot be predicted.",
            )
        text = self.text
        if not text.decodes_to(response, turn.response):
            raise self._boundary_error(turn, response)
        body = response[:-1] if response and response[-1] in self.known.ids else response
        for token in body:
            if token in text.special_ids and not self.options.allows(text.decode([token])):
                raise special_token_error(text.decode([token]), turn.where, self.known, text)
        # Where the text ends, stop tokens and white space behind it left aside; decoded from there, as bytes may need others.
        last = next((i for i in range(len(body) - 1, -1, -1) if self._text_in(body[i:])), None)
        if last is None:
            raise MaskingError(
                "the response is empty.",
                code="empty_response",
                remedy='Remove the row; {errors:errors="drop"} drops such rows and counts them.',
            )
        stop = next((i for i in range(last + 1, len(response)) if response[i] in self.known.ids), None)
        return [*response, self._end_of_sequence()] if stop is None else response[: stop + 1]

    def _stops(self, response: list[int]) -> list[int]:
        """Where the tokens of the response that stop generation end, in order."""
        ends = []
        for stop in self.known.ids:
            start = 0
            for _ in range(response.count(stop)):
                start = response.index(stop, start) + 1
                ends.append(start)
        return sorted(ends)

    def _what_follows(self, ids: list[int]) -> tuple[str, bool]:
        """The text of `ids`, and whether they hold more than special tokens and white space; of few, remembered."""
        key = tuple(ids)
        if key not in self._behind:
            found = self.text.decode(ids), self._text_in(ids)
            if len(key) > 4:
                return found
            if len(self._behind) > 4096:
                self._behind.clear()
            self._behind[key] = found
        return self._behind[key]

    def _text_in(self, ids: list[int]) -> bool:
        """Whether `ids` hold more than special tokens and white space."""
        return bool(self.text.decode([token for token in ids if token not in self.text.special_ids]).strip())

    def _end_of_sequence(self) -> int:
        given = tuple(self.options.stop_token_ids or ())
        eos: int | None = self.text.tokenizer.eos_token_id
        if eos is not None and (not given or eos in given):
            return eos
        if len(given) == 1:
            return given[0]
        raise MaskingError(
            "no one EOS token is known to end the response with, so nothing would teach the model to stop.",
            code="missing_stop",
            remedy="Use a tokenizer that has an EOS token, "
            "{one_stop_token:pass one id in `stop_token_ids`}, or end responses with one of "
            "them.",
        )

    def _end_by_header(self, row: Row, following: list[int]) -> None:
        """A turn without a stop token of its own is ended by the header that follows, if that begins with one (GLM)."""
        if row.input_ids[-1] in self.known.ids:
            return
        if not following or following[0] not in self.known.ids:
            raise self._missing_stop(row.turns[-1], f"what follows is {self.text.decode(following[:3])!r}")
        start, end = row.spans[-1]
        row.spans[-1] = (start, end + 1)

    def _finished(self, row: Row) -> Row:
        if row.input_ids[-1] not in self.known.ids:
            turn = row.turns[-1]
            messages = turn.conversation.messages
            following = messages[turn.index + 1]["role"] if turn.index + 1 < len(messages) else ""
            if following not in self.known.headers:
                following = "tool" if turn.message.get("tool_calls") else "user"
            if following not in self.known.headers:
                raise self._missing_stop(turn, f"it ends with {turn.response[-40:]!r}")
            start, end = row.spans[-1]
            row.input_ids = [*row.input_ids, self.known.headers[following]]
            row.spans[-1] = (start, end + 1)
        return row

    def _missing_stop(self, turn: Turn, got: str) -> MaskingError:
        named = ", ".join(f"{token} {self.text.decode([token])!r}" for token in self.known.candidates)
        return MaskingError(
            f"{turn.where} renders without a token that stops generation; {got}."
            + (f" Ids that could stop it: {named}." if named else ""),
            code="missing_stop",
            remedy="A model trained on this never stops. {stop_tokens:Pass the model's `stop_token_ids` (the EOS ids of its "
            "generation config)}, or a `chat_template` that ends assistant turns with the EOS token.",
        )

    def _boundary_error(self, turn: Turn, ids: list[int]) -> MaskingError:
        """Why `ids` are not the tokens of the response: a character without a token, or text altered at the boundary."""
        tokenizer, expected = self.text.tokenizer, turn.response
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            return MaskingError(
                f"{turn.where}: the tokenizer has no token for part of it and puts {tokenizer.unk_token!r} there.",
                code="content_lost",
                remedy="Use a tokenizer that covers the text (byte fallback), or clean the text.",
            )
        got = self.text.decode(ids)
        parted = first_difference(got, expected)
        return MaskingError(
            f"{turn.where}: its ids do not decode to its text: at character {parted} they give "
            f"{got[parted : parted + 30]!r}, the text has {expected[parted : parted + 30]!r}.",
            code="boundary",
            remedy="This tokenizer cannot continue the prompt exactly here; move white space to the other side of the "
            "boundary, or use the model's fast tokenizer.",
        )
