"""Texts of turns → ids and labels. This is where parity, coverage and stop are established, on ids.

    prompt        response                    added                response
    1 20 21 22    31 32 2 13                  20 23 22             33 2
    − −  −  −     31 32 2 −     (13: "\\n")   −  −  −              33 2

Parity of a later turn: its whole prompt must tokenise to exactly the row so far. That holds, joint by joint, where `added`
begins with a special token (a safe joint, see `text.py`) and the earlier response, tokenised together with the prompt before
it, gives the same ids as apart. Where a joint is not safe the whole prompt is tokenised and compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import MaskingError
from sft_plugins.masking.checks import first_missing
from sft_plugins.masking.options import MaskingOptions
from sft_plugins.masking.plan import Turn, history_rewrite
from sft_plugins.masking.text import TextTokenizer


@dataclass
class Row:
    """A row in the making: ids so far, the supervised spans `[start, end)` in them, and the turns they belong to."""

    input_ids: list[int]
    spans: list[tuple[int, int]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)  # ids the template adds after the last stop token
    repeated: int = 0

    def labels(self) -> list[int]:
        labels = [IGNORE_INDEX] * len(self.input_ids)
        for start, end in self.spans:
            labels[start:end] = self.input_ids[start:end]
        return labels


class TextIds:
    """Ids of every text that a batch of plans needs, from two calls of the tokenizer."""

    def __init__(self, text: TextTokenizer, plans: Iterable[list[Turn]]) -> None:
        self._text = text
        plain: dict[str, None] = {}
        responses: dict[str, None] = {}
        for turns in plans:
            for turn, following in zip(turns, [*turns[1:], None], strict=True):
                plain[turn.prompt if turn.added is None else turn.added] = None
                responses[turn.response] = None
                if following is not None and following.added is not None:
                    if text.is_safe_joint(following.added) and (head := self.generation_head(turn)) is not None:
                        plain[head + turn.response] = None
                    else:
                        plain[following.prompt] = None
        self.plain: dict[str, list[int]] = dict(zip(plain, text.encode(list(plain)), strict=True))
        self.responses = dict(zip(responses, text.encode_continuations(list(responses)), strict=True))

    def generation_head(self, turn: Turn) -> str | None:
        """The end of a turn's prompt that may be tokenised on its own: the assistant's header, typically."""
        prompt = turn.prompt if turn.added is None else turn.added
        start = self._text.last_safe_joint(prompt)
        return None if start is None else prompt[start:]

    def joins(self, row_ids: list[int], turn: Turn, following: Turn) -> bool:
        """Whether the whole prompt of `following` tokenises to `row_ids` (which end with its added text)."""
        added = following.added or ""
        head = self.generation_head(turn) if self._text.is_safe_joint(added) else None
        if head is None:
            return self.plain[following.prompt] == row_ids
        return self.plain[head + turn.response] == self._text.encode_short(head) + self.responses[turn.response]


def assemble(
    turns: list[Turn],
    ids: TextIds,
    text: TextTokenizer,
    stops: frozenset[int],
    header_stops: Mapping[str, int],
    options: MaskingOptions,
) -> Iterator[Row]:
    """Rows of one conversation, each with one or more of its supervised turns.

    Raises:
        MaskingError: `boundary`, `content_lost`, `missing_stop`, `history_rewrite`.
    """
    row: Row | None = None
    for turn in turns:
        if row is not None and turn.added is not None:
            candidate = row.input_ids + row.pending + ids.plain[turn.added]
            if ids.joins(candidate, row.turns[-1], turn):
                _end_by_header(row, candidate, text, stops)
                row.input_ids = candidate
                _append_response(row, turn, ids, text, stops)
                continue
            if options.on_history_rewrite == "raise":
                raise history_rewrite(turn.index, "tokens merge across the turns")
        if row is not None:
            yield _finished(row, stops, header_stops)
        repeated = 0 if row is None else len(row.input_ids)
        prompt_ids = ids.plain[turn.prompt] if turn.prompt in ids.plain else text.encode([turn.prompt])[0]
        row = Row(list(prompt_ids), repeated=min(repeated, len(prompt_ids)))
        _append_response(row, turn, ids, text, stops)
    if row is not None:
        yield _finished(row, stops, header_stops)


def _append_response(row: Row, turn: Turn, ids: TextIds, text: TextTokenizer, stops: frozenset[int]) -> None:
    response = ids.responses[turn.response]
    end = supervised_length(turn, response, text, stops)
    start = len(row.input_ids)
    row.spans.append((start, start + end))
    row.input_ids = row.input_ids + response[:end]
    row.pending = response[end:]
    row.turns.append(turn)


def supervised_length(turn: Turn, response: list[int], text: TextTokenizer, stops: frozenset[int]) -> int:
    """How many ids of the response carry loss: those up to the first stop token behind all of the turn's text.

    All of them where the template puts no stop token into the turn; `_finished` then looks at what follows.
    """
    for end in [i + 1 for i, token in enumerate(response) if token in stops] or [len(response)]:
        decoded = text.decode(response[:end])
        if not turn.response.startswith(decoded):
            # A tokenizer that normalises Unicode gives other characters back; then the turn is compared as a whole.
            if not text.decodes_to(response, turn.response):
                raise boundary_error(turn.where, turn.response, response[:end], text)
            decoded = turn.response
        if first_missing(decoded, turn.message) is None:
            return end
    missing = first_missing(turn.response, turn.message)
    if missing is not None:
        raise MaskingError(
            f"{turn.where}: the chat template does not render {missing[:60]!r} of the data.",
            code="content_lost",
            remedy="The template drops or rewrites this part (reasoning, tool calls, a list of parts?). Pass a "
            "`chat_template` that renders it, or take it out of the data.",
        )
    raise _missing_stop(turn, f"the last of its text comes after its last stop token: {turn.response[-60:]!r}")


def _end_by_header(row: Row, candidate: list[int], text: TextTokenizer, stops: frozenset[int]) -> None:
    """A turn without a stop token of its own is ended by the header that follows, if that is one (GLM)."""
    start, end = row.spans[-1]
    if candidate[end - 1] in stops:
        return
    if row.pending or candidate[end] not in stops:
        raise _missing_stop(row.turns[-1], f"what follows is {text.decode(candidate[end : end + 3])!r}")
    row.spans[-1] = (start, end + 1)


def _finished(row: Row, stops: frozenset[int], header_stops: Mapping[str, int]) -> Row:
    if row.input_ids[-1] not in stops:
        turn = row.turns[-1]
        messages = turn.conversation.messages
        following = messages[turn.index + 1]["role"] if turn.index + 1 < len(messages) else ""
        if following not in header_stops:
            following = "tool" if turn.message.get("tool_calls") else "user"
        if following not in header_stops:
            raise _missing_stop(turn, f"it ends with {turn.response[-40:]!r}")
        start, end = row.spans[-1]
        row.input_ids = [*row.input_ids, header_stops[following]]
        row.spans[-1] = (start, end + 1)
    return row


def boundary_error(where: str, expected: str, ids: list[int], text: TextTokenizer) -> MaskingError:
    """Why `ids` are not the tokens of `expected`: a character without a token, or text altered at the boundary."""
    if text.tokenizer.unk_token_id is not None and text.tokenizer.unk_token_id in ids:
        return MaskingError(
            f"{where}: the tokenizer has no token for part of it and puts {text.tokenizer.unk_token!r} there.",
            code="content_lost",
            remedy="Use a tokenizer that covers the text (byte fallback), or clean the text.",
        )
    got = text.decode(ids)
    parted = next(
        (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
    )
    return MaskingError(
        f"{where}: its ids do not decode to its text: at character {parted} they give {got[parted : parted + 30]!r}, "
        f"the text has {expected[parted : parted + 30]!r}.",
        code="boundary",
        remedy="This tokenizer cannot continue the prompt exactly here; move white space to the other side of the "
        "boundary, or use the model's fast tokenizer.",
    )


def _missing_stop(turn: Turn, got: str) -> MaskingError:
    return MaskingError(
        f"{turn.where} renders without a token that stops generation; {got}.",
        code="missing_stop",
        remedy="A model trained on this never stops. Pass the model's `stop_token_ids` (the EOS ids of its generation "
        "config), or a `chat_template` that ends assistant turns with the EOS token.",
    )
