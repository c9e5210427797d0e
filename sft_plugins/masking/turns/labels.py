"""Texts of turns → ids and labels. This is where parity, coverage and stop are established, on ids.

    prompt        response                    added                response
    1 20 21 22    31 32 2 13                  20 23 22             33 2
    − −  −  −     31 32 2 −     (13: "\\n")   −  −  −              33 2

Parity of a later turn: its whole prompt must tokenise to exactly the row so far. That holds, joint by joint, where `added`
begins at a safe joint (see `tokenizer.py`) and the turn before it is `joined` (see `turn_ids.py`). Where it is not shown
that way, the whole prompt is tokenised and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import MaskingError
from sft_plugins.masking.checks import first_missing
from sft_plugins.masking.options import MaskingOptions
from sft_plugins.masking.turns.tokenizer import TextTokenizer
from sft_plugins.masking.turns.turn_ids import TurnIds
from sft_plugins.masking.turns.turns import Turn, history_rewrite


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


def assemble(
    turns: list[Turn],
    ids: list[TurnIds],
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
    before_joined = False
    for turn, own in zip(turns, ids, strict=True):
        prompt = own.prompt
        if row is not None and turn.added is not None:
            following = row.pending + own.prompt
            if (before_joined and text.is_safe_joint(turn.added)) or (
                text.encode([turn.prompt])[0] == row.input_ids + following
            ):
                _end_by_header(row, following, text, stops)
                row.input_ids += following
                _append_response(row, turn, own.response, text, stops)
                before_joined = own.joined
                continue
            if options.on_history_rewrite == "raise":
                raise history_rewrite(turn.index, "tokens merge across the turns")
            prompt = text.encode([turn.prompt])[0]
        repeated = 0
        if row is not None:
            yield _finished(row, stops, header_stops)
            repeated = min(len(row.input_ids), len(prompt))
        row = Row(list(prompt), repeated=repeated)
        _append_response(row, turn, own.response, text, stops)
        before_joined = own.joined
    if row is not None:
        yield _finished(row, stops, header_stops)


def _append_response(row: Row, turn: Turn, response: list[int], text: TextTokenizer, stops: frozenset[int]) -> None:
    end = supervised_length(turn, response, text, stops)
    start = len(row.input_ids)
    row.spans.append((start, start + end))
    row.input_ids += response[:end]
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


def _end_by_header(row: Row, following: list[int], text: TextTokenizer, stops: frozenset[int]) -> None:
    """A turn without a stop token of its own is ended by the header that follows, if that begins with one (GLM)."""
    if row.input_ids[-1] in stops:
        return
    if row.pending or following[0] not in stops:
        raise _missing_stop(row.turns[-1], f"what follows is {text.decode(following[:3])!r}")
    start, end = row.spans[-1]
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
