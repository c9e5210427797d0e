"""The experiment that shows whether documents of a packed row see one another, on the very model at hand.

Invariant: under `untouched(model)` it leaves the model, its buffers and modes, and every random generator as they were.

Two questions, asked of the model's own logits on made-up documents (lengths 7, 1, 12, 7, say):
1. Does each document get in the packed row what it gets alone?   (catches wrong positions, masks, windows, states)
2. Does changing every other document leave the rest unchanged?   (catches leaks that are small in effect)
A control tells whether the experiment could have failed: changing one token must move later logits of its own document,
and must not move earlier ones.

Tolerance of 1, relative to the largest logit: in float32 1e-5, or 4 times what separates a document alone from the same
document in an ordinary right-padded batch, if that is more, but never over 1e-4. In half precision, and in float32 with
TF32 products, the same with 8 and 32 units of that type's rounding (`torch.finfo(dtype).eps`) for 1e-5 and 1e-4. Of 2:
bit for bit, or, where a backend's sums run in another order (experts, batched documents), the same tolerance.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sft_plugins._models import lowest_precision
from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.boundaries import Boundaries

_LONGEST_WINDOW = 64
"""Windows and chunks up to this size are crossed by a document of the probe; longer ones would cost too much."""


@dataclass(frozen=True)
class Reference:
    """What the model says about the documents run alone.

    Args:
        documents: int64 [1, l] each.
        others: the same documents with every token changed.
        logits: float32 [l, V] each.
        scale: largest logit.
        effect: how much one token moves later logits of its own document, relative to `scale`.
        tolerance: relative to `scale`.
        run: what was called, and is to be called for comparison (see `entrance`).
    """

    documents: list[torch.Tensor]
    others: list[torch.Tensor]
    logits: list[torch.Tensor]
    scale: float
    effect: float
    tolerance: float
    notes: tuple[str, ...]
    run: nn.Module


@dataclass(frozen=True)
class Measured:
    """What the packed forward says, set against the reference.

    Args:
        alone_delta: largest difference from a document run alone, relative to the largest logit.
        perturbed_delta: largest change in a document when the others are changed, likewise.
        leaked: tokens that changed by more than the tolerance when other documents did.
        touched: tokens that changed at all.
        tokens: tokens compared.
        failure: why this is not isolation; None if it is.
    """

    alone_delta: float
    perturbed_delta: float
    leaked: int
    touched: int
    tokens: int
    failure: str | None


def entrance(model: nn.Module, lm: nn.Module) -> nn.Module:
    """The module to call for a forward of `lm`, the causal LM inside `model`: `lm`, or the root of FSDP2's sharding.

    `fully_shard` gathers weights in hooks of the modules it was called on. Beneath its root (a PEFT wrapper, as a rule) some
    weights would still be in shards, and the first unit to be called would take itself for the root for good.

    Raises:
        ContaminationError: `sharded`, if `lm` is sharded and the root is not at hand.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return lm
    from torch.distributed.fsdp import FSDPModule

    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    for root in (model, lm):
        if isinstance(root, FSDPModule):
            return root
    if any(isinstance(module, FSDPModule) for module in lm.modules()):
        raise ContaminationError(
            f"the layers of {type(lm).__name__} are sharded by FSDP2, and the model given is not what was sharded",
            code="sharded",
            remedy="pass the model that fully_shard or the trainer took, or isolate it before it is sharded",
        )
    return lm


def reference_of(model: nn.Module, *, run: nn.Module | None = None) -> Reference:
    """Run the probe's documents alone, through a causal LM (unwrapped) that `untouched` holds still.

    Args:
        run: the `entrance` to `model`, where that is another module.

    Raises:
        ContaminationError: `not_causal` if a token moves earlier logits; `probe_blind` if it moves no later ones;
            `probe_failed` if the model cannot be run on token ids alone.
    """
    run = model if run is None else run
    device = next(model.parameters()).device
    lengths, notes = _lengths(model)
    ids = _ordinary_ids(model)
    generator = torch.Generator().manual_seed(0)
    documents, others = [], []
    for length in lengths:
        chosen = torch.randint(len(ids), (1, length), generator=generator)
        shift = torch.randint(1, max(len(ids), 2), (1, length), generator=generator)
        documents.append(ids[chosen].to(device))
        others.append(ids[(chosen + shift) % len(ids)].to(device))
    try:
        logits = [logits_of(run, {"input_ids": document})[0] for document in documents]
        longest = int(np.argmax(lengths))
        middle = lengths[longest] // 2
        changed = documents[longest].clone()
        changed[:, middle] = others[longest][:, middle]
        moved = (logits_of(run, {"input_ids": changed})[0] - logits[longest]).abs()
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ContaminationError(
            f"{type(model).__name__} could not be run on a plain document: {type(error).__name__}: {error}",
            code="probe_failed",
            remedy="check that the model runs on input_ids alone, on the device it is on",
        ) from error
    scale = max(float(one.abs().max()) for one in logits)
    later = float(moved[middle + 1 :].max())
    if not np.isfinite(scale) or scale == 0 or later == 0:
        raise ContaminationError(
            f"the logits of {type(model).__name__} do not depend on earlier tokens (largest logit {scale:.3g}), so no "
            "leak could show",
            code="probe_blind",
            remedy="load trained weights, or initialise them, before isolating the model",
        )
    earlier, effect = float(moved[:middle].max()) / scale, later / scale
    tolerance = _tolerance(model, run, documents, logits, scale)
    if earlier > tolerance:
        raise ContaminationError(
            f"a token of {type(model).__name__} moves earlier logits by {earlier:.2g} of the largest logit",
            code="not_causal",
            remedy="only causal language models can be packed; set is_decoder or is_causal in the model's config",
        )
    return Reference(documents, others, logits, scale, effect, tolerance, tuple(notes), run)


def measure(reference: Reference) -> Measured:
    """Run the packed row three times: as it is, with every second document changed, with the others changed."""
    boundaries = Boundaries(np.array([document.shape[1] for document in reference.documents]))
    packed = _split(reference.run, reference.documents, boundaries)
    alone = [(a - b).abs().amax(-1) / reference.scale for a, b in zip(packed, reference.logits, strict=True)]
    moved = []
    for kept in (0, 1):
        mixed = [
            document if index % 2 == kept else other
            for index, (document, other) in enumerate(zip(reference.documents, reference.others, strict=True))
        ]
        again = _split(reference.run, mixed, boundaries)
        moved += [
            (a - b).abs().amax(-1) / reference.scale for a, b in zip(again[kept::2], packed[kept::2], strict=True)
        ]
    # `nan > x` is False: a NaN must count as a difference.
    worst_alone, changes = float(torch.cat(alone).nan_to_num(torch.inf).max()), torch.cat(moved).nan_to_num(torch.inf)
    leaked, touched = int((changes > reference.tolerance).sum()), int((changes > 0).sum())
    failure = None
    if leaked:
        failure = f"changing other documents moved the logits of {leaked} of {changes.numel()} tokens"
    elif worst_alone > reference.tolerance:
        failure = "documents get other logits packed than alone"
    elif touched and reference.effect < 10 * reference.tolerance:
        failure = (
            f"changing other documents moved {touched} tokens by rounding errors, and the weights are too weak for a "
            f"leak to show beside them (a token moves later logits by {reference.effect:.2g})"
        )
    return Measured(worst_alone, float(changes.max()), leaked, touched, changes.numel(), failure)


def logits_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """float32 logits [B, T, V] of an ordinary forward, without autocast; a packed batch is passed as a host passes it."""
    options = {} if "position_ids" in batch else {"use_cache": False}
    with torch.autocast(batch["input_ids"].device.type, enabled=False):
        output = model(**options | batch)
    return (output.logits if hasattr(output, "logits") else output[0]).float()


def _split(model: nn.Module, documents: list[torch.Tensor], boundaries: Boundaries) -> list[torch.Tensor]:
    ids = torch.cat(documents, dim=1)
    logits = logits_of(model, {"input_ids": ids, **boundaries.batch(ids.device)})[0]
    return list(logits.split(boundaries.lengths.tolist()))


def _lengths(model: nn.Module) -> tuple[list[int], list[str]]:
    """Unequal, equal and single-token documents, the longest crossing every small window or chunk twice."""
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    names = ("sliding_window", "attention_chunk_size", "window_size", "local_attention_window", "attention_window_size")
    windows = {name: getattr(text, name, None) for name in names}
    sizes = {name: size for name, size in windows.items() if isinstance(size, int) and size > 0}
    crossed = [size for size in sizes.values() if size <= _LONGEST_WINDOW]
    longest = max([12, *(2 * size + 3 for size in crossed)])
    notes = [
        f"{name} = {size} is longer than the documents of the probe"
        for name, size in sizes.items()
        if size > _LONGEST_WINDOW
    ]
    return [7, 1, longest, 7, 5], notes


def _ordinary_ids(model: nn.Module) -> torch.Tensor:
    """Token ids without a meaning of their own for the model's code (padding, images …)."""
    special: set[int] = set()
    for config in (model.config, getattr(model.config, "text_config", None)):
        for name, value in vars(config).items() if config is not None else ():
            if name.endswith(("_token_id", "_token_index", "_token_ids")):
                special |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [i for i in range(min(vocabulary, 4096)) if i not in special]
    return torch.tensor(ids if len(ids) > 1 else list(range(vocabulary)))


def _tolerance(
    model: nn.Module, run: nn.Module, documents: list[torch.Tensor], logits: list[torch.Tensor], scale: float
) -> float:
    """What may separate a document alone from itself in another layout; see the module's first lines."""
    dtype, device = lowest_precision(model), documents[0].device
    if dtype in (torch.float16, torch.bfloat16):
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
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError):
        return least  # a model that takes no padded batch
    noise = max(float((row[: len(one)] - one).abs().max()) for row, one in zip(together, logits, strict=True)) / scale
    return min(max(least, 4 * noise), most) if np.isfinite(noise) else least
