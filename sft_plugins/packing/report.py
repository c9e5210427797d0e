"""What packing did to the data, and what it changes for training: data first, a table from that data.

Invariant: nothing is lost unseen. `rows_in = documents + dropped`, `tokens_in = tokens + Σ lost tokens` (+ what trees share).
A stream counts in a `Tally`, of which `to_dict` and `from_dict` are inverse, through JSON too: resumed, it reports as if
unbroken.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins._report import as_text
from sft_plugins.packing.prefix_tree.report import PrefixReport

PADDED_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
FIRST_ROWS = 5
"""How many row numbers a report names per kind of loss."""

LOSSES = {
    "overflow": "longer than max_length, dropped",
    "truncated": "longer than max_length, cut at the end",
    "truncated_to_prompt": "cut until no supervised token was left, dropped",
    "no_supervised_tokens": "no supervised token, dropped",
}
"""Every way in which tokens can be lost. Only `truncated` keeps the document."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What one policy cost: rows it touched (the first of them by number), tokens and supervised tokens gone."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    first_rows: tuple[int, ...] = ()

    def __add__(self, other: Loss) -> Loss:
        return Loss(
            rows=self.rows + other.rows,
            tokens=self.tokens + other.tokens,
            supervised_tokens=self.supervised_tokens + other.supervised_tokens,
            first_rows=(self.first_rows + other.first_rows)[:FIRST_ROWS],
        )


@dataclass(frozen=True, kw_only=True)
class TrainingChange:
    """One epoch before and after packing, at the same number of rows per optimizer step."""

    rows_per_step: int
    steps_before: int
    steps_after: int
    documents_per_step_before: float
    documents_per_step_after: float
    tokens_per_step_before: float
    tokens_per_step_after: float
    rows_per_step_for_same_documents: int
    """Packed rows per optimizer step that hold about as many documents as a step held before."""

    def __str__(self) -> str:
        return (
            f"at {self.rows_per_step} rows per optimizer step, one epoch goes from {self.steps_before:,} to "
            f"{self.steps_after:,} steps, each with {self.documents_per_step_before:,.0f} → "
            f"{self.documents_per_step_after:,.0f} documents and {self.tokens_per_step_before:,.0f} → "
            f"{self.tokens_per_step_after:,.0f} tokens. Fewer, larger steps change the optimisation: take "
            f"{self.rows_per_step_for_same_documents} packed rows per step to keep its size, or retune the learning rate."
        )


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What `pack_dataset` or `pack_stream` did. Counts are exact.

    Attributes:
        max_length: capacity of a packed row, in tokens.
        rows_in, tokens_in: what was given.
        documents, tokens, supervised_tokens: what the packed rows hold.
        rows: packed rows.
        longest: tokens of the longest document packed.
        padded: batch size → tokens that an epoch costs, in expectation, when random batches of that many documents are
            padded to their longest (exact expectation over all orders of the documents).
        lost: a `Loss` per way of losing tokens that was met, keyed as in `LOSSES`.
        prefixes: what `share_prefixes` did; `tokens` are then those of the trees.
    """

    max_length: int
    rows_in: int
    tokens_in: int
    documents: int
    tokens: int
    supervised_tokens: int
    rows: int
    longest: int
    padded: dict[int, int]
    lost: dict[str, Loss] = field(default_factory=dict)
    prefixes: PrefixReport | None = None

    @property
    def fill(self) -> float:
        """Share of the packed rows' capacity that holds tokens."""
        return self.tokens / (self.rows * self.max_length) if self.rows else 1.0

    @property
    def lower_bound(self) -> int:
        """⌈tokens / max_length⌉: no packing has fewer rows."""
        return -(-self.tokens // self.max_length)

    @property
    def rows_above_bound(self) -> int:
        return self.rows - self.lower_bound

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    @property
    def padded_to_max_length(self) -> int:
        """Tokens per epoch if every document were padded to `max_length`."""
        return self.documents * self.max_length

    @property
    def dropped(self) -> int:
        """Rows of the data that are not packed at all."""
        return sum(loss.rows for kind, loss in self.lost.items() if kind != "truncated")

    def training(self, batch_size: int, *, gradient_accumulation_steps: int = 1, world_size: int = 1) -> TrainingChange:
        """Optimizer steps, documents and tokens per step: documents one per row, and packed.

        Steps are counted as `transformers.Trainer` counts them: ⌈⌈rows / (batch_size · world_size)⌉ / accumulation⌉.
        """
        per_step = batch_size * gradient_accumulation_steps * world_size
        rows, documents = max(self.rows, 1), max(self.documents, 1)

        def steps(count: int) -> int:
            return math.ceil(math.ceil(count / (batch_size * world_size)) / gradient_accumulation_steps)

        before, after = min(per_step, self.documents), min(per_step, self.rows)
        return TrainingChange(
            rows_per_step=per_step,
            steps_before=steps(self.documents),
            steps_after=steps(self.rows),
            documents_per_step_before=float(before),
            documents_per_step_after=after * self.documents / rows,
            tokens_per_step_before=before * self.tokens / documents,
            tokens_per_step_after=after * self.tokens / rows,
            rows_per_step_for_same_documents=max(1, round(per_step * self.rows / documents)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the fields, and what follows from them."""
        derived = {
            name: getattr(self, name)
            for name in (
                "dropped",
                "fill",
                "lower_bound",
                "rows_above_bound",
                "supervised_share",
                "padded_to_max_length",
            )
        }
        prefixes = self.prefixes and self.prefixes.to_dict()
        return dataclasses.asdict(self) | derived | {"prefixes": prefixes}

    def table(self) -> Any:
        """The report as a `rich.table.Table`."""
        from rich.table import Table

        table = Table(title=f"Packed to rows of {self.max_length:,} tokens", show_header=False, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column()
        for name, value, note in self._lines():
            table.add_row(name, value, note)
        return table

    def _lines(self) -> list[tuple[str, str, str]]:
        waste = self.rows_above_bound / self.lower_bound if self.lower_bound else 0.0
        tokens = max(self.tokens, 1)
        lines = [
            ("documents", f"{self.documents:,}", f"of {self.rows_in:,} rows; the longest has {self.longest:,} tokens"),
            ("packed rows", f"{self.rows:,}", f"{self.documents / max(self.rows, 1):.1f} documents each"),
            (
                "lower bound",
                f"{self.lower_bound:,}",
                f"⌈tokens / max_length⌉; {self.rows_above_bound:,} above ({waste:.3%})",
            ),
            ("fill", f"{self.fill:.2%}", f"{self.tokens:,} tokens"),
            ("supervised", f"{self.supervised_share:.2%}", f"{self.supervised_tokens:,} tokens carry loss"),
        ]
        lines += [self.prefixes.line()] if self.prefixes else []
        if 8 in self.padded:
            cost = self.padded[8]
            lines.append(
                ("padded, batches of 8", f"{cost / tokens:.2f}×", f"{cost:,} tokens, each batch to its longest")
            )
        cost = self.padded_to_max_length
        lines.append(("padded to max_length", f"{cost / tokens:.2f}×", f"{cost:,} tokens"))
        for kind, loss in self.lost.items():
            rows = ", ".join(map(str, loss.first_rows)) + (", …" if loss.rows > len(loss.first_rows) else "")
            gone = f"{loss.tokens:,} tokens lost, {loss.supervised_tokens:,} of them supervised; rows {rows}"
            lines.append((kind, f"{loss.rows:,}", f"{LOSSES[kind]}: {gone}"))
        lines.append(("training", "", str(self.training(8))))
        return lines

    def __str__(self) -> str:
        return as_text(self.table(), width=100)


@dataclass
class Tally:
    """What a pass has read and yielded so far; `lengths` counts the documents yielded, per length."""

    rows_in: int = 0
    tokens_in: int = 0
    rows: int = 0
    supervised_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    lost: dict[str, Loss] = field(default_factory=dict)
    prefixes: PrefixReport | None = None

    def read(self, *, rows: int, tokens: int, lost: Mapping[str, Loss]) -> None:
        self.rows_in += rows
        self.tokens_in += tokens
        for kind, loss in lost.items():
            self.lost[kind] = self.lost.get(kind, Loss()) + loss

    def add(self, packed: dict[str, Any], documents: npt.NDArray[Any]) -> None:
        """`documents`: tokens of each that `packed` holds; of trees, of each row that they stand for."""
        self.rows += 1
        self.supervised_tokens += int(np.count_nonzero(packed["labels"] != IGNORE_INDEX))
        self.lengths.update(documents.tolist())
        if "seq_depths" in packed:
            depths = packed["seq_depths"].astype(np.int64)
            self.fold(PrefixReport.of_rows(documents, depths, packed["seq_lengths"] - depths))

    def fold(self, report: PrefixReport) -> None:
        self.prefixes = (self.prefixes or PrefixReport()) + report

    def report(self, max_length: int) -> PackReport:
        lengths = np.array(sorted(self.lengths), np.int64)
        counts = np.array([self.lengths[length] for length in lengths.tolist()], np.int64)
        return PackReport(
            max_length=max_length,
            rows_in=self.rows_in,
            tokens_in=self.tokens_in,
            documents=int(counts.sum()),
            tokens=self.prefixes.tree_tokens if self.prefixes else int((lengths * counts).sum()),
            supervised_tokens=self.supervised_tokens,
            rows=self.rows,
            longest=int(lengths.max(initial=0)),
            padded=expected_padding(lengths, counts),
            lost=dict(self.lost),
            prefixes=self.prefixes,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: its object keys are strings, so `lengths` travels as pairs."""
        return dataclasses.asdict(self) | {"lengths": sorted(self.lengths.items())}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tally:
        lost = {kind: Loss(**loss | {"first_rows": tuple(loss["first_rows"])}) for kind, loss in data["lost"].items()}
        prefixes = data.get("prefixes") and PrefixReport(**data["prefixes"])
        lengths = Counter(dict(map(tuple, data["lengths"])))
        return cls(**dict(data) | {"lengths": lengths, "lost": lost, "prefixes": prefixes})


def expected_padding(lengths: npt.NDArray[Any], counts: npt.NDArray[Any]) -> dict[int, int]:
    """Expected tokens of an epoch whose shuffled batches are padded to their longest, per batch size.

    Equal to the mean, over all orders of the documents, of Σ over batches of (documents in it × longest in it).
    A batch of k documents of a random order is a uniform k-subset, and its longest is at most v with probability
    C(N_v, k) / C(n, k), N_v documents having at most v tokens.

    Args:
        lengths: `[m]` distinct lengths, rising.
        counts: `[m]` documents of each.

    Example:
        >>> expected_padding(np.array([1, 3]), np.array([1, 1]))[2]
        6
    """
    n = int(counts.sum())
    at_most = np.cumsum(counts)

    def longest(k: int) -> float:
        below = np.ones(len(lengths))
        for j in range(k):
            below *= np.maximum(at_most - j, 0) / (n - j)
        return float(np.sum(lengths * np.diff(below, prepend=0.0)))

    padded = {}
    for size in PADDED_BATCH_SIZES if n else ():
        full, rest = divmod(n, size)
        padded[size] = round((full * size * longest(size) if full else 0.0) + (rest * longest(rest) if rest else 0.0))
    return padded
