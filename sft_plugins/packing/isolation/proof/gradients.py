"""The backward of a few documents: what their logits make of the weights, alone and in a packed row.

Invariant: no `.grad` is written; frozen weights stay frozen.

Measured are the gradients of the small trainable weights (all of a small model's), and of the embeddings of each token id,
even where every weight is frozen: ids that stand in other documents only must get none, which holds in half precision too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sft_plugins.packing.isolation.proof.float32 import HALF

Gradients = dict[str, torch.Tensor]

_TOKEN = "embedding of token"

_MOST = 2**24
"""Values of gradients asked for at most, so that a large model needs no second copy of its weights."""


def watched(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable weights whose gradients are compared, smallest first, as many as `_MOST` allows."""
    chosen: dict[str, nn.Parameter] = {}
    left = _MOST
    for name, weight in sorted(model.named_parameters(), key=lambda item: item[1].numel()):
        if weight.requires_grad and weight.dtype.is_floating_point and weight.numel() <= left:
            chosen[name], left = weight, left - weight.numel()
    return chosen


def weighting(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """What the logits of one document are multiplied by before they are summed; never saturated as a loss may be."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(logits.shape, generator=generator).to(logits.device)


def gradients_of(model: nn.Module, value: Callable[[], torch.Tensor]) -> Gradients:
    """Gradients, by name, of the scalar that `value` computes."""
    weights = watched(model)
    # What a hook collects inside a compiled graph is not part of it, so the backward runs as plain code.
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"), _embeddings(model) as embedded:
        scalar = value()
        states = [state for _, state in embedded]
        found = torch.autograd.grad(scalar, [*states, *weights.values()], allow_unused=True)
    gradients = {
        name: gradient.detach()
        for name, gradient in zip(weights, found[len(states) :], strict=True)
        if gradient is not None
    }
    for (ids, _), gradient in zip(embedded, found[: len(states)], strict=True):
        if gradient is not None:
            flat = gradient.detach().float().flatten(0, -2)
            present, at = torch.unique(ids, return_inverse=True)
            summed = torch.zeros(len(present), flat.shape[-1], device=flat.device).index_add_(0, at.flatten(), flat)
            for token, row in zip(present.tolist(), summed, strict=True):
                key = f"{_TOKEN} {token}"
                gradients[key] = gradients[key] + row if key in gradients else row
    return gradients


def strays(expected: Gradients, found: Gradients) -> float:
    """Largest gradient of an embedding whose token stands in no document that was run backward, relative to the largest
    of those that were. Nothing passed on is exactly nothing, in any arithmetic."""
    most = {known: [0.0] for known in (True, False)}
    for name, gradient in found.items():
        if name.startswith(_TOKEN):
            most[name in expected].append(float(gradient.abs().nan_to_num(torch.inf).max()))
    return max(most[False]) / max(*most[True], 1e-30)


def apart(expected: Gradients, found: Gradients) -> tuple[float, str]:
    """Largest difference, each relative to the largest value of its own gradient, and the name of that one.

    Some gradients are zero but for rounding (a bias of the keys, which softmax cancels), so none is measured against less
    than a hundredth of the largest gradient of all.
    """
    floor = 1e-2 * max((float(one.abs().max()) for one in expected.values()), default=0.0)
    worst, where = 0.0, ""
    for name in expected.keys() | found.keys():
        one, other = expected.get(name), found.get(name)
        present = one if one is not None else other
        assert present is not None
        one, other = (torch.zeros_like(present) if side is None else side for side in (one, other))
        size = max(float(one.abs().max()), floor, 1e-30)
        difference = float((one.float() - other.float()).abs().nan_to_num(torch.inf).max()) / size
        # Whatever it was computed in, the gradient of a half-precision weight is rounded to the weight's own type.
        difference -= max((2 * torch.finfo(g.dtype).eps for g in (one, other) if g.dtype in HALF), default=0.0)
        if difference > worst:
            worst, where = difference, name
    return worst, where


@contextmanager
def _embeddings(model: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collects the ids and the states of every call of the input embeddings, made to ask for gradients."""
    collected: list[tuple[torch.Tensor, torch.Tensor]] = []

    def collect(_: nn.Module, arguments: tuple[Any, ...], states: Any) -> Any:
        if arguments and isinstance(states, torch.Tensor) and states.shape[:-1] == arguments[0].shape:
            states = states if states.requires_grad else states.detach().requires_grad_()
            collected.append((arguments[0], states))
        return states

    # First in line: what another hook adds to the states lies between them and the logits.
    handle = model.get_input_embeddings().register_forward_hook(collect, prepend=True)
    try:
        yield collected
    finally:
        handle.remove()
