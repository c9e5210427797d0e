"""`MaskReport`: what masking did to a data set, as data first (dataclass → dict → JSON) and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins._report import as_text

FIRST_ROWS = 5
PREFIX_TOKENS = 512
PREFIX_ROWS = 10_000
CHANGES = {
    "continued": "the prompt and the message's own text, where the template does not render the turn behind its prompt",
    "reasoning_inlined": "reasoning that the template does not know, put in front of the answer",
    "reasoning_dropped": "reasoning that the template does not know, left out",
    "greeting_untrained": "an assistant's greeting opens the conversation: context, without loss",
    "text_as_parts": "text given to the template as a list of one part, the form that it renders",
    "arguments_as_text": "arguments of calls given to the template as JSON text, the form that it renders",
    "tools_wrapped": "schemas of tools given to the template as {type: function, function: …}, the form that it renders",
    "content_empty": "messages without content given to the template with an empty one",
}


@dataclass(frozen=True)
class Failures:
    """How often one code occurred, the first rows it occurred in, and the first message.

    Attributes:
        too_long: of `count`, those that `max_length` alone is behind: rows that are longer, and those that a cut to it
            left nothing to train on.
        first_documents: where rows are packed, which document of each of `first_rows`, counted from 0; else empty.
    """

    count: int
    first_rows: list[int]
    example: str
    too_long: int = 0
    first_documents: list[int] = field(default_factory=list)

    @property
    def places(self) -> str:
        """`#3, #9, …`, or `#3 document 1, …` where rows are packed; documents are counted from 1, as `inspect` shows them."""
        names = [f"#{row}" for row in self.first_rows]
        if self.first_documents:
            names = [f"{name} document {i + 1}" for name, i in zip(names, self.first_documents, strict=True)]
        return ", ".join(names) + (", …" if self.count > len(names) else "")


@dataclass(frozen=True)
class RepeatedPrefixes:
    """How much prompt is the same text over and over: the dilution that masking removes.

    `tokens` of the `prompt_tokens` looked at (the first `PREFIX_TOKENS` of each prompt in the first `PREFIX_ROWS` rows)
    repeat the beginning of another row's prompt. Unmasked, each of them would be trained on again.
    """

    tokens: int
    prompt_tokens: int
    rows: int


@dataclass
class MaskReport:
    """Counts over a data set; for a stream it grows as rows are drawn.

    Attributes:
        rows_in, rows_out: rows of data, rows to train on.
        split_rows: rows of data that became more than one row, at a price of `repeated_tokens` prompt tokens.
        dropped_rows: rows of data of which nothing is left; `failures` says why, by code.
        tokens, supervised_tokens: over the rows out.
        lost_tokens, lost_supervised_tokens: cut off by the overflow policy in `cut_rows` rows.
        role_tokens: tokens by origin; `trained` are the supervised ones.
        stop_tokens: how often each id ended a supervised run.
        longest: `(row, tokens)` of the longest rows out.
        modes: supervised turns by the mode of the template that gives their prompt; empty where templates have one.
        unread_columns: columns of the data of which nothing is known, so that they had no effect.
        unread_keys: rows of data by keys of messages and switches that the chat template does not read: no effect either.
        changes: turns by what was done so that they are exact, `CHANGES` says what each means.
    """

    rows_in: int = 0
    rows_out: int = 0
    split_rows: int = 0
    repeated_tokens: int = 0
    dropped_rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    supervised_runs: int = 0
    cut_rows: int = 0
    lost_tokens: int = 0
    lost_supervised_tokens: int = 0
    role_tokens: dict[str, int] = field(default_factory=dict)
    stop_tokens: dict[str, int] = field(default_factory=dict)
    failures: dict[str, Failures] = field(default_factory=dict)
    longest: list[tuple[int, int]] = field(default_factory=list)
    repeated_prefixes: RepeatedPrefixes | None = None
    modes: dict[str, int] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    unread_columns: list[str] = field(default_factory=list)
    unread_keys: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def supervised_share(self) -> float:
        """Supervised tokens / tokens; 0 for no tokens."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    @property
    def ok(self) -> bool:
        """Whether no row failed."""
        return not self.failures

    def add_failure(
        self, code: str, row: int, message: str, *, too_long: bool = False, document: int | None = None
    ) -> None:
        seen = self.failures.get(code, Failures(0, [], message))
        rows, documents = list(seen.first_rows), list(seen.first_documents)
        if len(rows) < FIRST_ROWS:
            rows.append(row)
            documents += [] if document is None else [document]
        self.failures[code] = Failures(seen.count + 1, rows, seen.example, seen.too_long + too_long, documents)

    def add_rows(
        self, sources: np.ndarray, ids: np.ndarray, labels: np.ndarray, offsets: np.ndarray, names: dict[int, str]
    ) -> None:
        """Count rows out: row i is `ids[offsets[i] : offsets[i + 1]]`, none of them empty, made from row `sources[i]`.

        `names` gives the text of stop tokens.
        """
        if not len(sources):
            return
        supervised = labels != IGNORE_INDEX
        last = np.zeros(len(ids), bool)
        last[offsets[1:] - 1] = True
        ends = np.flatnonzero(supervised & (last | ~np.append(supervised[1:], False)))
        lengths = np.diff(offsets)
        self.rows_out += len(sources)
        self.tokens += len(ids)
        self.supervised_tokens += int(supervised.sum())
        self.supervised_runs += len(ends)
        for token, count in zip(*np.unique(ids[ends], return_counts=True), strict=True):
            name = names.get(int(token), f"id {token}")
            self.stop_tokens[name] = self.stop_tokens.get(name, 0) + int(count)
        top = np.argsort(-lengths, kind="stable")[:FIRST_ROWS]
        candidates = [*self.longest, *((int(sources[i]), int(lengths[i])) for i in top)]
        self.longest = sorted(candidates, key=lambda pair: -pair[1])[:FIRST_ROWS]

    def add_turns(
        self, modes: Mapping[str, int], changes: Mapping[str, int], unread: Mapping[str, int], *, times: int = 1
    ) -> None:
        """Count what a row tells of its turns, `times` over."""
        for counts, added in ((self.modes, modes), (self.changes, changes), (self.unread_keys, unread)):
            for name, count in added.items():
                counts[name] = counts.get(name, 0) + count * times

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "supervised_share": self.supervised_share}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        return as_text(self, width=110)

    def __rich__(self) -> Any:
        return _table(self)


def repeated_prefixes(prompts: list[np.ndarray]) -> RepeatedPrefixes:
    """Prompt tokens that repeat the beginning of another prompt: what a prefix tree of the prompts would share.

    Sorted, prompts that begin alike are neighbours, so the shared tokens are the common prefixes of neighbours:

        1 2 3 | 1 2 4 | 1 5      →      2 + 1 = 3 of 8 tokens
    """
    # Big-endian words sort as bytes in the order of their numbers, and a common prefix of words is one of bytes.
    heads = [prompt[:PREFIX_TOKENS] for prompt in prompts]
    spelled = np.concatenate([*heads, np.empty(0, np.int32)]).astype(">u4").tobytes()
    words = sorted(spelled[4 * start : 4 * end] for start, end in pairwise(accumulate(map(len, heads), initial=0)))
    shared = 0
    for left, right in pairwise(words):
        width = min(len(left), len(right))
        # As numbers: what two have in common at their front are the zeros in front of what they differ by.
        other = int.from_bytes(left[:width], "big") ^ int.from_bytes(right[:width], "big")
        shared += (8 * width - other.bit_length()) // 32
    return RepeatedPrefixes(tokens=shared, prompt_tokens=sum(map(len, words)) // 4, rows=len(words))


def _table(report: MaskReport) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Masking", title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def add(name: str, text: str, style: str = "") -> None:
        # Text, not markup: tokens and messages come from data, where "[/INST]" is no tag of ours.
        table.add_row(Text(name, style), Text(text))

    def share(part: int, whole: int) -> str:
        return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"

    add("rows", f"{report.rows_in:,} in, {report.rows_out:,} out, {report.dropped_rows:,} dropped")
    if report.split_rows:
        add(
            "history split",
            f"{report.split_rows:,} rows became several, repeating {share(report.repeated_tokens, report.tokens)} tokens; "
            f"rendered once they would be {report.tokens - report.repeated_tokens:,}, and packed with share_prefixes=True what "
            "they share is computed once",
        )
    add("tokens", f"{report.tokens:,}")
    add("carry loss", f"{share(report.supervised_tokens, report.tokens)} in {report.supervised_runs:,} answers")
    origin = ", ".join(f"{name} {share(count, report.tokens)}" for name, count in report.role_tokens.items() if count)
    if origin:
        add("by origin", origin)
    if report.cut_rows:
        add(
            "cut by overflow",
            f"{report.cut_rows:,} rows: {report.lost_tokens:,} tokens, {report.lost_supervised_tokens:,} of them supervised",
        )
    stops = ", ".join(f"{name} ×{count:,}" for name, count in report.stop_tokens.items())
    add("answers end on", stops or "–")
    if report.modes:
        add("turns by mode", ", ".join(f"{name} ×{count:,}" for name, count in report.modes.items()))
    for name, count in report.changes.items():
        add(name.replace("_", " "), f"{count:,} turns: {CHANGES.get(name, '')}".rstrip(": "))
    if report.longest:
        add("longest rows", ", ".join(f"#{row}: {length:,}" for row, length in report.longest))
    prefixes = report.repeated_prefixes
    if prefixes is not None:
        add(
            "same prompt again",
            f"{share(prefixes.tokens, prefixes.prompt_tokens)} of the prompt tokens of {prefixes.rows:,} rows "
            "repeat another prompt's beginning; masked, they cost no gradient",
        )
    for code, failures in sorted(report.failures.items(), key=lambda item: -item[1].count):
        add(code, f"{failures.count:,} (rows {failures.places}): {failures.example}", style="red")
    if report.unread_columns:
        add("columns not read", ", ".join(report.unread_columns))
    if report.unread_keys:
        add("keys not read", ", ".join(f"{key} ×{count:,}" for key, count in sorted(report.unread_keys.items())))
    for note in report.notes:
        add("note", note)
    return table
