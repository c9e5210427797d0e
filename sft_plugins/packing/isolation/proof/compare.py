"""What a model says of the proof's documents packed, set against what it says of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sft_plugins.packing.isolation.boundaries import Boundaries
from sft_plugins.packing.isolation.proof.documents import TRAINED
from sft_plugins.packing.isolation.proof.gradients import apart, gradients_of, strays
from sft_plugins.packing.isolation.proof.limits import lowered
from sft_plugins.packing.isolation.proof.observe import Observed, gap, logits_of, weighted


@dataclass(frozen=True)
class Measured:
    """What the packed forwards say, set against the documents alone.

    Args:
        alone_delta: largest difference from a document run alone, relative to the largest logit.
        perturbed_delta: largest change in a document when the others are changed, likewise.
        leaked: tokens that changed by more than the tolerance when other documents did.
        touched: tokens that changed at all.
        tokens: tokens compared.
        failure: why this is not isolation; None if it is.
        spread: root mean square of the changes, relative to the largest logit.
    """

    alone_delta: float
    perturbed_delta: float
    leaked: int
    touched: int
    tokens: int
    failure: str | None
    spread: float


def compare(model: nn.Module, run: nn.Module, observed: Observed) -> Measured:
    """Run the rows packed: each as it is; the first with every second document changed, then the others; and backward."""
    with observed.arithmetic():
        row = observed.rows[0]
        packed = _packed(run, row.documents, row.boundaries)
        worst, where = gap(packed, row.logits), ""
        moved, squares = [], 0.0
        for kept in (0, 1):
            mixed = [
                document if index % 2 == kept else other
                for index, (document, other) in enumerate(zip(row.documents, observed.others, strict=True))
            ]
            again = _packed(run, mixed, row.boundaries)
            for one, other in zip(again[kept::2], packed[kept::2], strict=True):
                moved.append((one - other).abs().amax(-1))
                squares += float((one - other).square().mean(-1).sum())
        # `nan > x` is False: a NaN must count as a difference.
        changes = torch.cat(moved).nan_to_num(torch.inf) / observed.scale
        for further in observed.rows[1:]:
            with lowered(model, further.limits):
                found = gap(_packed(run, further.documents, further.boundaries), further.logits)
            if found > max(worst, observed.tolerance * observed.scale):
                worst, where = found, f", {further.what}"
        alone_delta = worst / observed.scale
        backward = _backward_packed(model, run, observed) if observed.gradients is not None else None
    leaked, touched = int((changes > observed.tolerance).sum()), int((changes > 0).sum())
    failure = None
    if leaked:
        failure = f"changing other documents moved the logits of {leaked} of {changes.numel()} tokens"
    elif alone_delta > observed.tolerance:
        failure = f"documents get other logits packed than alone{where}"
    elif touched and observed.effect < 10 * observed.tolerance:
        failure = (
            f"changing other documents moved {touched} tokens by rounding errors, and the weights are too weak for a "
            f"leak to show beside them (a token moves later logits by {observed.effect:.2g})"
        )
    elif backward is not None:
        failure = backward
    spread = (squares / max(changes.numel(), 1)) ** 0.5 / observed.scale
    return Measured(alone_delta, float(changes.max()), leaked, touched, changes.numel(), failure, spread)


def _packed(run: nn.Module, documents: Sequence[torch.Tensor], boundaries: Boundaries) -> list[torch.Tensor]:
    ids = torch.cat(list(documents), dim=1).reshape(boundaries.rows, -1)
    logits = logits_of(run, {"input_ids": ids, **boundaries.batch(ids.device)})
    return list(logits.flatten(0, 1).split(boundaries.lengths.tolist()))


def _backward_packed(model: nn.Module, run: nn.Module, observed: Observed) -> str | None:
    """Why the gradients are not those of the documents alone; None if they are."""
    row = observed.rows[0]

    def value() -> torch.Tensor:
        packed = _packed(run, row.documents, row.boundaries)
        return torch.stack([weighted(packed[index], index) for index in TRAINED]).sum()

    assert observed.gradients is not None
    found = gradients_of(model, value)
    if stray := strays(observed.gradients, found):
        return f"documents get gradients from the loss of others ({stray:.1e} of the largest)"
    apart_by, name = apart(observed.gradients, found)
    if apart_by > 10 * observed.tolerance:
        return f"documents get other gradients packed than alone ({name} by {apart_by:.1e} of its largest)"
    return None
