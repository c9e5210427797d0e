"""What a model says of the proof's documents alone, in one arithmetic, and how finely that tells a leak from rounding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sft_plugins._models import is_sharded, lowest_precision
from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.backends.rotary import start_afresh
from sft_plugins.packing.isolation.boundaries import Boundaries
from sft_plugins.packing.isolation.proof.documents import CONTROL, SHORT, TRAINED, Documents
from sft_plugins.packing.isolation.proof.float32 import HALF
from sft_plugins.packing.isolation.proof.gradients import Gradients, gradients_of, weighting
from sft_plugins.packing.isolation.proof.limits import AFFORDABLE, LOWERED, lowered, onsets, windows

FAILS = (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError, AssertionError, NotImplementedError)
"""What model code raises where it does not take what it is given."""


@dataclass(frozen=True)
class Row:
    """Documents that are packed together, and what each gets alone.

    Args:
        what: how this row differs from the first, in words.
        documents: int64 [1, l] each; logits: float32 [l, V] each.
        rows: rows of the batch that the documents fill.
        limits: names of limits that are lowered while it runs.
    """

    what: str
    documents: list[torch.Tensor]
    logits: list[torch.Tensor]
    rows: int = 1
    limits: tuple[str, ...] = ()

    @property
    def boundaries(self) -> Boundaries:
        return Boundaries(np.array([document.shape[1] for document in self.documents]), self.rows)


@dataclass(frozen=True)
class Observed:
    """The documents alone.

    Args:
        arithmetic: what the comparison is to run in too.
        rows: the first row, and others where this arithmetic carries the whole proof.
        others: the documents of the first row with every token changed.
        gradients: of the documents `TRAINED` of the first row; None where they could not be had.
        scale: largest logit. effect: how much one token moves later logits of its own document, relative to it.
        tolerance: relative to `scale`. noise: root mean square of what a document alone is from itself padded, likewise.
    """

    arithmetic: Callable[[], AbstractContextManager[Any]]
    rows: list[Row]
    others: list[torch.Tensor]
    gradients: Gradients | None
    scale: float
    effect: float
    tolerance: float
    noise: float
    notes: tuple[str, ...]


def observe(
    model: nn.Module,
    run: nn.Module,
    documents: Documents,
    arithmetic: Callable[[], AbstractContextManager[Any]],
    *,
    whole: bool,
    wide: bool,
) -> Observed:
    """Run the documents alone.

    Args:
        run: what to call for a forward of `model`.
        whole: whether to observe further rows and lowered limits too.
        wide: whether `arithmetic` computes in float32 whatever type the weights have; the backward has no such form.

    Raises:
        ContaminationError: `not_causal` if a token moves earlier logits; `probe_blind` if it moves no later ones.
    """
    notes: list[str] = []
    gradients: Gradients | None = None
    with arithmetic():
        first = [_alone(model, run, document) for document in documents.first]
        middle = documents.first[CONTROL].shape[1] // 2
        changed = documents.first[CONTROL].clone()
        changed[:, middle] = documents.others[CONTROL][:, middle]
        moved = (_alone(model, run, changed) - first[CONTROL]).abs()
        scale, effect = _control(model, first, moved, middle)
        tolerance, noise = _tolerance(model, run, documents.first, first, scale, wide=wide)
        if (earlier := float(moved[:middle].max()) / scale) > tolerance:
            raise ContaminationError(
                f"a token of {type(model).__name__} moves earlier logits by {earlier:.2g} of the largest logit",
                code="not_causal",
                remedy="only causal language models can be packed; set is_decoder or is_causal in the model's config",
            )
        rows = [Row("", documents.first, first)]
        if whole:
            special = [_alone(model, run, document) for document in documents.special]
            again = documents.reordered
            rows.append(
                Row(
                    "in two rows with the ids that begin, end and pad them",
                    documents.special + [documents.first[i] for i in again],
                    special + [first[i] for i in again],
                    rows=2,
                )
            )
            rows += _beyond_limits(model, run, documents, first, notes)
        if not wide:
            gradients = _backward_alone(model, run, documents, notes)
    return Observed(arithmetic, rows, documents.others, gradients, scale, effect, tolerance, noise, tuple(notes))


def logits_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """float32 logits [B, T, V] of an ordinary forward, without autocast; a packed batch is passed as a host passes it."""
    options = {} if "position_ids" in batch else {"use_cache": False}
    with torch.autocast(batch["input_ids"].device.type, enabled=False):
        output = model(**options | batch)
    return (output.logits if hasattr(output, "logits") else output[0]).float()


def _alone(model: nn.Module, run: nn.Module, document: torch.Tensor) -> torch.Tensor:
    start_afresh(model)
    return logits_of(run, {"input_ids": document})[0]


def gap(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    gaps = [(a - b).abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(gaps).nan_to_num(torch.inf).max())


def _control(model: nn.Module, logits: list[torch.Tensor], moved: torch.Tensor, middle: int) -> tuple[float, float]:
    scale = max(float(one.abs().max()) for one in logits)
    later = float(moved[middle + 1 :].max())
    if not np.isfinite(scale) or scale == 0 or later == 0:
        raise ContaminationError(
            f"the logits of {type(model).__name__} do not depend on earlier tokens (largest logit {scale:.3g}), so no "
            "leak could show",
            code="probe_blind",
            remedy="load trained weights, or initialise them, before isolating the model",
        )
    return scale, later / scale


def _beyond_limits(
    model: nn.Module, run: nn.Module, documents: Documents, logits: list[torch.Tensor], notes: list[str]
) -> list[Row]:
    """A row that crosses the limits out of reach, lowered; none where lowering them changes nothing."""
    far = {name: size for name, size in {**windows(model), **onsets(model)}.items() if size > AFFORDABLE}
    if not far:
        return []
    listed = ", ".join(f"{name} = {size}" for name, size in far.items())
    chosen = [documents.first[i] for i in SHORT]
    try:
        with lowered(model, far):
            alone = [_alone(model, run, document) for document in chosen]
    except FAILS as error:
        notes.append(f"not seen: {listed}; the model fails with lower ones ({type(error).__name__})")
        return []
    if gap(alone, [logits[i] for i in SHORT]) == 0:
        notes.append(f"not seen: {listed}, longer than the documents of the probe; lowered, it changes nothing")
        return []
    notes.append(f"{listed}: crossed by the probe as {LOWERED}")
    return [Row(f"where {listed} is {LOWERED}", chosen, alone, limits=tuple(far))]


def _backward_alone(model: nn.Module, run: nn.Module, documents: Documents, notes: list[str]) -> Gradients | None:
    if is_sharded(run):  # the root may stand outside of the model, and its weights lie whole between two forwards
        notes.append("not seen: gradients, since the weights are sharded")
        return None
    summed: Gradients = {}
    try:
        for index in TRAINED:

            def value(index: int = index) -> torch.Tensor:
                return weighted(_alone(model, run, documents.first[index]), index)

            gradients = gradients_of(model, value)
            for name, gradient in gradients.items():
                summed[name] = summed[name] + gradient if name in summed else gradient
    except FAILS as error:
        reason = str(error).splitlines()[0][:100] if str(error) else ""
        notes.append(f"not seen: gradients, which a document alone does not give ({type(error).__name__}: {reason})")
        return None
    return summed


def weighted(logits: torch.Tensor, index: int) -> torch.Tensor:
    return (logits * weighting(logits, index)).sum()


def _tolerance(
    model: nn.Module,
    run: nn.Module,
    documents: list[torch.Tensor],
    logits: list[torch.Tensor],
    scale: float,
    *,
    wide: bool,
) -> tuple[float, float]:
    """What may separate a document alone from itself in another layout, and the root mean square of what does."""
    dtype, device = lowest_precision(model), documents[0].device
    if dtype in HALF and not wide:
        unit = torch.finfo(dtype).eps
        least, most = 8 * unit, 32 * unit
    elif device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        least, most = 8 * torch.finfo(torch.float16).eps, 32 * torch.finfo(torch.float16).eps
    else:
        least, most = 1e-5, 1e-4
    longest = max(document.shape[1] for document in documents)
    padded = torch.cat([nn.functional.pad(d, (0, longest - d.shape[1]), value=int(d[0, 0])) for d in documents])
    mask = torch.stack([torch.arange(longest, device=device) < d.shape[1] for d in documents]).long()
    try:
        together = logits_of(run, {"input_ids": padded, "attention_mask": mask})
    except FAILS:
        return least, 0.0  # a model that takes no padded batch
    gaps = [row[: len(one)] - one for row, one in zip(together, logits, strict=True)]
    noise = max(float(gap.abs().max()) for gap in gaps) / scale
    spread = float(torch.cat(gaps).square().mean().sqrt()) / scale
    if (
        not noise <= most
    ):  # no rounding: padding means something to this model, or frequencies follow the longest document
        return least, 0.0
    return min(max(least, 4 * noise), most), spread
