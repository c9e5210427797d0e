"""One row of data as it will be trained, token by token: what the terminal, the page and --json of `inspect` all show.

raw row        →  PromptMasker        →  one or several rows of tokens, or the error that refuses it
tokenised row  →  its own masks       →  one row of tokens, with the faults that `check_masks` finds
packed row     →  its own labels      →  one row of tokens, with its documents, what they share, and their faults
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins._rows import Segments
from sft_plugins.cli.ui.render import Kind, token_kinds
from sft_plugins.errors import MaskingError
from sft_plugins.masking import ChatRenderer, PromptMasker, TextTokenizer, assistant_header, check_masks, label_arrays
from sft_plugins.preflight import segments_of, with_lengths

Span = tuple[int, int]
_CONTEXT = 8  # tokens before one that may share a character with it, and more


@dataclass(frozen=True)
class Fault:
    """Why a row is refused, or what is wrong with its mask; `asked_for` where the overflow policy leaves it out, as told."""

    code: str
    message: str
    remedy: str = ""
    asked_for: bool = False


@dataclass(frozen=True)
class ShownRow:
    """A row of tokens.

    Attributes:
        row: number in the data. part: which of the rows that it became, 0 for the first.
        ids, labels, texts, kinds: `[T]` each; the texts joined are the row's text.
        turns, documents: spans of tokens that cover the row.
        segments: of a packed row, which of its documents are branches of which.
        faults: empty for an exact row.
    """

    row: int
    part: int = 0
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    turns: list[Span] = field(default_factory=list)
    documents: list[Span] = field(default_factory=list)
    segments: Segments | None = None
    faults: list[Fault] = field(default_factory=list)

    @property
    def trained(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)

    def shared(self, document: int) -> tuple[int, int] | None:
        """Of a branch: the document that it goes on from, and how many of its first tokens are that one's too."""
        if self.segments is None or self.segments.parents[document] < 0:
            return None
        return int(self.segments.parents[document]), int(self.segments.depths[document]) + 1

    def sees(self, document: int) -> list[Span]:
        """Spans of the row that a branch sees before its own tokens."""
        if self.segments is None:
            return []
        before = self.segments.paths()[document][: self.segments.depths[document]]
        pieces = np.split(before, np.flatnonzero(np.diff(before) != 1) + 1) if len(before) else []
        return [(int(piece[0]), int(piece[-1]) + 1) for piece in pieces]


class RowReader:
    """Reads rows of data into what is shown of them."""

    def __init__(self, masker: PromptMasker) -> None:
        self._tokenizer, self._masker = masker.tokenizer, masker
        self._text = TextTokenizer(masker.tokenizer)
        header = assistant_header(self._text, ChatRenderer(masker.tokenizer))
        self._opening = next((token for token in header if token in self._text.special_ids), None)

    def read(self, row: Mapping[str, Any], number: int) -> Iterator[ShownRow]:
        """What becomes of row `number`."""
        if row.get("input_ids") is not None:
            yield self._tokenised(row, number)
            return
        (outcome,) = self._masker.encode_batch([row])
        for part, example in enumerate(outcome.rows):
            yield self._shown(number, part, example.input_ids, example.labels)
        if outcome.errors:
            asked = outcome.too_long and self._masker.options.overflow != "raise"
            faults = [Fault(error.code, error.message, error.remedy or "", asked) for error in outcome.errors]
            yield ShownRow(number, part=len(outcome.rows), faults=faults)

    def _tokenised(self, row: Mapping[str, Any], number: int) -> ShownRow:
        try:
            ids, labels = label_arrays(row)
        except MaskingError as error:
            return ShownRow(number, faults=[Fault(error.code, error.message, error.remedy or "")])
        report = check_masks([with_lengths(dict(row))], self._tokenizer)
        faults = [Fault(code, found.example) for code, found in report.failures.items()]
        if "id_out_of_range" in report.failures:  # ids of another tokenizer have no text
            return ShownRow(number, faults=faults)
        mask = None
        if row.get("attention_mask") is not None:  # `label_arrays` leaves padding out; here it is shown
            mask = [int(bool(value)) for value in row["attention_mask"]]
            padded = np.full(len(mask), IGNORE_INDEX)
            padded[np.array(mask, bool)] = labels
            ids, labels = np.asarray(row["input_ids"]), padded
        segments = segments_of(row, ids)
        return self._shown(number, 0, ids.tolist(), labels.tolist(), mask=mask, segments=segments, faults=faults)

    def _shown(
        self,
        row: int,
        part: int,
        ids: list[int],
        labels: list[int],
        *,
        mask: list[int] | None = None,
        segments: Segments | None = None,
        faults: Sequence[Fault] = (),
    ) -> ShownRow:
        special, stops = self._text.special_ids, self._masker.stop_token_ids
        kinds = token_kinds(labels, input_ids=ids, special_ids=special, stop_ids=stops, attention_mask=mask)
        starts = turn_starts(ids, labels, special_ids=special, stop_ids=stops, opening=self._opening)
        if segments is None:
            texts, documents = token_texts(self._text, ids), []
        else:
            ends = np.cumsum(segments.lengths).tolist()
            documents = list(pairwise([0, *ends]))
            # Along its path, for a branch may begin within a character.
            paths = [token_texts(self._text, [ids[at] for at in path]) for path in segments.paths()]
            texts = [text for path, depth in zip(paths, segments.depths, strict=True) for text in path[depth:]]
        starts |= {start for start, _ in documents}
        turns = list(pairwise([*sorted(starts), len(ids)]))
        return ShownRow(row, part, ids, labels, texts, kinds, turns, documents, segments, list(faults))


def turn_starts(
    ids: Sequence[int],
    labels: Sequence[int],
    *,
    special_ids: Collection[int],
    stop_ids: Collection[int],
    opening: int | None,
) -> set[int]:
    """Where turns begin: at the special token that opens the template's headers, and after each trained answer.

    A stop token that is not trained and a newline behind it still belong to the answer, so that turn ends at the next
    special token, if one is near:

        [<s>] hi [<e>] \\n [<s>] yo [<e>] \\n [<s>] hi          opening <s>, the second turn trained
        0                 4                8            →  0 4 8
    """
    starts = {0} | {i for i, token in enumerate(ids) if token == opening}
    for end in range(1, len(ids)):
        if labels[end - 1] != IGNORE_INDEX and labels[end] == IGNORE_INDEX:
            after = next((i for i in range(end, len(ids)) if ids[i] not in stop_ids), len(ids))
            near = range(after, min(after + 3, len(ids)))
            starts.add(next((i for i in near if ids[i] in special_ids), after))
    return starts - {len(ids)} if ids else set()


def token_texts(text: TextTokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined, the text of `ids`.

    A character of several tokens is shown with the last of them: bytes F0 9F | 98 80 → "" and "😀".
    """
    if text.pieces is None:
        return [_added_text(text, ids[max(0, i - _CONTEXT) : i + 1]) for i in range(len(ids))]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = text.pieces
    return [decoder.decode(pieces[token], final=i == len(ids) - 1) for i, token in enumerate(ids)]


def _added_text(text: TextTokenizer, ids: Sequence[int]) -> str:
    """What the last of `ids` adds to the text of those before it."""
    before, now = (text.decode(part).rstrip("\ufffd") for part in (ids[:-1], ids))
    return now[len(before) :] if now.startswith(before) else text.decode(ids[-1:])
