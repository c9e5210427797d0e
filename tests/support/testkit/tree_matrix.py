"""A row of trees on one architecture: every branch against its row alone, and against changed siblings.

segment 0 (23 tokens) ├ 8: 1 (5) ─ 10: 3 (4)      forks in a branch, near each other, in the last token
                      ├ 19: 2 (9)
                      └ 22: 4 (6)                 5 (5), 6 (1): documents of their own
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.apply import isolate
from sft_plugins.packing.isolation.trees import Trees
from testkit.isolation_matrix import GRADIENTS, LOGITS, NO_GRADIENTS
from testkit.isolation_oracle import Gap, Run, gap
from testkit.prefix_forest import Row, Segment, paths_of
from testkit.tiny_models import build

PAGE = Path(__file__).parents[3] / "docs" / "tree-matrix.md"

SHAPE = [(23, -1, 0), (5, 0, 8), (9, 0, 19), (4, 1, 10), (6, 0, 22), (5, -1, 0), (1, -1, 0)]
"""(tokens, parent, depth)."""
_BESIDE = {1: (0, 2, 4, 5, 6), 2: (0, 1, 3, 4, 5, 6)}
"""Of a branch that is changed, those that do not see it."""


def segments(vocab_size: int, *, changed: int | None = None) -> list[Segment]:
    """Random tokens in the shape of `SHAPE`; all but the first of each segment are trained. `changed` has other ones."""
    generator = np.random.default_rng(0)
    made: list[Segment] = []
    for number, (length, parent, depth) in enumerate(SHAPE):
        tokens = generator.integers(4, vocab_size, length).tolist()
        if number == changed:
            tokens = [4 + (token - 3) % (vocab_size - 4) for token in tokens]
        if parent >= 0:
            tokens[0] = paths_of(made)[parent][0][depth]
        made.append((tokens, [-100, *tokens[1:]], parent, depth))
    return made


def flat(made: Sequence[Segment], part: int) -> list[int]:
    """Tokens (0) or labels (1) of all segments, end to end."""
    return [value for segment in made for value in segment[part]]  # type: ignore[attr-defined]


def trees_of(made: Sequence[Segment]) -> Trees:
    lengths, parents, depths = (
        np.array(values) for values in zip(*((len(t), p, d) for t, _, p, d in made), strict=True)
    )
    return Trees(lengths=lengths, depths=depths, parents=parents)


def tree_batch(made: Sequence[Segment]) -> dict[str, Any]:
    return {"input_ids": torch.tensor([flat(made, 0)]), **trees_of(made).batch("cpu")}


def summed_loss(logits: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """The plain loss of the next token, as every trainer computes it."""
    if len(labels) < 2:
        return logits.sum() * 0
    return F.cross_entropy(logits[:-1].double(), torch.tensor(labels[1:]), reduction="sum")


def loss_alone(model: nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    logits = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids, _ in rows]
    return torch.stack([summed_loss(one, labels) for one, (_, labels) in zip(logits, rows, strict=True)]).sum()


def run_tree(model: nn.Module, made: Sequence[Segment], *, gradients: bool) -> Run:
    """All segments in one row, in one forward, under one plain loss."""
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(gradients):
        logits = model(**tree_batch(made)).logits[0]
        loss = summed_loss(logits, flat(made, 1))
        if gradients:
            loss.backward()
    return _run(model, [one.detach() for one in logits.split([len(tokens) for tokens, *_ in made])], loss)


def run_rows(model: nn.Module, made: Sequence[Segment], *, gradients: bool) -> Run:
    """Every path in a forward of its own; of its logits those of the segment's own tokens."""
    model.zero_grad(set_to_none=True)
    logits, total = [], torch.zeros((), dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        for (tokens, *_), (ids, labels) in zip(made, paths_of(list(made)), strict=True):
            out = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            loss = summed_loss(out, labels)
            if gradients and loss.requires_grad:
                loss.backward()
            logits.append(out.detach()[-len(tokens) :])
            total += loss.detach()
    return _run(model, logits, total)


def _run(model: nn.Module, logits: list[torch.Tensor], loss: torch.Tensor) -> Run:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Run(logits, loss.item(), gradients)


@dataclass(frozen=True)
class Branched:
    """What was found on one architecture; gaps are relative. `against`: what the proof says against trees."""

    name: str
    backend: str
    refusal: str = ""
    against: str = ""
    found: Gap = field(default_factory=lambda: Gap(0.0, 0.0, 0.0))
    spill: float = 0.0

    @property
    def exact(self) -> bool:
        served = not self.refusal and not self.against
        return (
            served
            and max(self.found.logits, self.found.loss, self.spill) <= LOGITS
            and self.found.gradients <= GRADIENTS
        )


def examine_trees(name: str, **changes: Any) -> Branched:
    """Measure one architecture, tiny, in fp32 on the CPU; `changes` override its configuration."""
    tiny = build(name, **changes)
    gradients = name not in NO_GRADIENTS
    made = segments(tiny.vocab_size)
    alone = run_rows(tiny.model, made, gradients=gradients)
    try:
        report = isolate(tiny.model, share_prefixes=True)
    except ContaminationError as error:
        return Branched(name, "", refusal=error.code)
    if not report.prefix_trees:
        said = next(note for note in report.notes if note.startswith("no trees"))
        return Branched(name, report.backend, against=said.partition(": ")[2].split(" Remedy:")[0][:160])
    packed = run_tree(tiny.model, made, gradients=gradients)
    spilled = 0.0
    scale = max(float(one.abs().max()) for one in alone.logits)
    for changed, beside in _BESIDE.items():
        others = run_tree(tiny.model, segments(tiny.vocab_size, changed=changed), gradients=False).logits
        assert not torch.equal(others[changed], packed.logits[changed]), "the changed branch itself must react"
        spilled = max(spilled, *(float((others[i] - packed.logits[i]).abs().max()) / scale for i in beside))
    return Branched(name, report.backend, found=gap(alone, packed), spill=spilled)


def table(rows: Sequence[Branched]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| architecture | backend | logits | gradients | siblings changed | refused |", "| --- " * 6 + "|"]
    for row in rows:
        if row.refusal or row.against:
            why = f"`{row.refusal}`" if row.refusal else f"`prefix_trees`: {row.against}"
            lines.append(f"| {row.name} | {row.backend} | | | | {why.replace('|', '/')} |")
            continue
        gradients = "–" if row.name in NO_GRADIENTS else f"{row.found.gradients:.0e}"
        spill = "0" if row.spill == 0 else f"{row.spill:.0e}"
        lines.append(f"| {row.name} | {row.backend} | {row.found.logits:.0e} | {gradients} | {spill} | |")
    return lines
