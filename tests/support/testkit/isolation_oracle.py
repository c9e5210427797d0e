"""What packing must equal: every document run alone, in a batch of one, without mask, positions or boundaries.

    >>> alone = run_alone(model, documents)
    >>> packed = run_packed(model, documents)
    >>> gap(alone, packed)
    Gap(logits=3e-07, loss=1e-07, gradients=2e-07)

Nothing here knows how isolation works: the packed row is handed to the model with the keys of a packed batch, and whatever
the model makes of it is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sft_plugins._constants import IGNORE_INDEX

Batch = dict[str, Any]
Documents = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Run:
    """Logits of each document [l, V], the loss summed over supervised tokens (nats), and its gradients by name."""

    logits: list[torch.Tensor]
    loss: float
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Gap:
    """Largest differences between two runs: logits to the largest logit, loss to the loss, gradients each to its own size."""

    logits: float
    loss: float
    gradients: float
    worst: str = ""
    """Name of the parameter whose gradient differs most."""


def make_documents(lengths: Iterable[int], vocab_size: int, *, seed: int = 0) -> list[torch.Tensor]:
    """Random token ids, none of them special (ids below 4 are pad, bos, eos and unk in the tiny models)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, vocab_size, (length,), generator=generator) for length in lengths]


def make_labels(documents: Documents) -> list[torch.Tensor]:
    """Labels of every document: its first token and every fifth one after it carry no loss."""
    labels = [document.clone() for document in documents]
    for label in labels:
        label[::5] = IGNORE_INDEX
    return labels


def packed_batch(documents: Documents, *, labels: bool = False) -> Batch:
    """The documents in one row, with every key that says where they end."""
    lengths = torch.tensor([len(document) for document in documents])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    batch: Batch = {
        "input_ids": torch.cat(list(documents))[None],
        "position_ids": torch.cat([torch.arange(int(length)) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
        "seq_idx": torch.repeat_interleave(torch.arange(len(documents)), lengths)[None].to(torch.int32),
    }
    if labels:
        batch["labels"] = torch.cat(make_labels(documents))[None]
    return batch


def plain_batch(documents: Documents) -> Batch:
    """What a naive packer makes: the documents in one row, and not a word about where they end."""
    return {"input_ids": torch.cat(list(documents))[None], "use_cache": False}


def run_alone(model: torch.nn.Module, documents: Documents, *, gradients: bool = True) -> Run:
    """Each document in a forward of its own; gradients of the summed loss."""
    model.zero_grad(set_to_none=True)
    logits, total = [], 0.0
    with torch.set_grad_enabled(gradients):
        for document, label in zip(documents, make_labels(documents), strict=True):
            out = model(input_ids=document[None], use_cache=False).logits[0]
            loss = _loss(out, label)
            if gradients and loss.requires_grad:
                loss.backward()
            logits.append(out.detach())
            total += loss.item()
    return Run(logits, total, _take_gradients(model))


def run_packed(
    model: torch.nn.Module,
    documents: Documents,
    *,
    gradients: bool = True,
    batch: Callable[[Documents], Batch] = packed_batch,
) -> Run:
    """All documents in one row, in one forward."""
    model.zero_grad(set_to_none=True)
    lengths = [len(document) for document in documents]
    with torch.set_grad_enabled(gradients):
        logits = model(**batch(documents)).logits[0].split(lengths)
        # Document by document: a label never meets the logits of the document before it.
        pairs = zip(logits, make_labels(documents), strict=True)
        loss = torch.stack([_loss(out, label) for out, label in pairs]).sum()
        if gradients:
            loss.backward()
    return Run([out.detach() for out in logits], loss.item(), _take_gradients(model))


def gap(expected: Run, measured: Run) -> Gap:
    """How far `measured` is from `expected`."""
    scale = max(float(out.abs().max()) for out in expected.logits)
    pairs = zip(expected.logits, measured.logits, strict=True)
    logits = max(float((a.double() - b.double()).abs().max()) for a, b in pairs) / scale
    worst, gradients = _gradient_gap(expected.gradients, measured.gradients)
    return Gap(logits, abs(expected.loss - measured.loss) / max(abs(expected.loss), 1e-12), gradients, worst)


def spill(model: torch.nn.Module, documents: Documents, changed: int, **kwargs: Any) -> float:
    """Largest relative change of the logits of all other documents when every token of document `changed` changes."""
    before = run_packed(model, documents, gradients=False, **kwargs).logits
    document = documents[changed]
    other = torch.where(document == 4, torch.full_like(document, 5), document - 1)
    after = run_packed(
        model, [*documents[:changed], other, *documents[changed + 1 :]], gradients=False, **kwargs
    ).logits
    scale = max(float(out.abs().max()) for out in before)
    rest = [i for i in range(len(documents)) if i != changed]
    assert float((before[changed] - after[changed]).abs().max()) > 0, "the changed document itself must react"
    return max(float((before[i] - after[i]).abs().max()) for i in rest) / scale


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if len(labels) < 2:
        return logits.sum() * 0
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")


def _take_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _gradient_gap(expected: dict[str, torch.Tensor], measured: dict[str, torch.Tensor]) -> tuple[str, float]:
    """Per parameter, largest difference over its largest gradient.

    Some gradients are zero but for rounding (a bias of the keys, which softmax cancels): what is left of sums of far
    larger terms. No parameter is therefore measured against less than a hundredth of the largest gradient of all.
    """
    floor = 1e-2 * max((float(g.abs().max()) for g in expected.values()), default=0.0)
    worst, largest = "", 0.0
    for name in expected.keys() | measured.keys():
        a, b = (side.get(name) for side in (expected, measured))
        present = a if a is not None else b
        zero = torch.zeros_like(present)
        a, b = (side if side is not None else zero for side in (a, b))
        relative = float((a - b).abs().max()) / max(float(a.abs().max()), floor, 1e-12)
        if relative > largest:
            worst, largest = name, relative
    return worst, largest
