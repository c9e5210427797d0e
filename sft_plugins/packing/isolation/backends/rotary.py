"""Rotary frequencies of each document, where a model takes them from the longest position of its whole row.

Invariant: inside a packed forward such a rotary module gives every document what a fresh copy of it gives the document
alone; in any other forward it runs as it is. Packed rows leave no trace in its state.

    longrope, original length 16, documents 30 and 10  →  alone: long factors, short factors; in one row: long for both

A module is known by what it does, not by its name: its forward takes `position_ids`, it has no weights, and far positions
change what it says of near ones. That is asked at every length that the configuration names, which costs microseconds
however large the length is. What grows and stays grown in a model (dynamic NTK) starts anew for each document.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from sft_plugins.packing.isolation.boundaries import Boundaries

PADDED = "padded"
"""Key of `Boundaries.scratch`: lengths of the documents of each padded batch by its width, where `unpack` runs them."""

_FURTHEST = 2**24
_TAKES_IT_OTHERWISE = (IndexError, RuntimeError, ValueError, TypeError)

Call = Callable[..., Any]


class PerDocument:
    """Stands in for the forward of a rotary module whose frequencies depend on the longest position.

    A plain object that refers to its module, for the reasons given at `forward.Entry`.

    Args:
        module: the rotary module.
        current: gives the boundaries of the packed forward in progress, or None.
    """

    def __init__(self, module: nn.Module, current: Callable[[], Boundaries | None]) -> None:
        self.module, self.current = module, current
        self.previous: Call | None = module.__dict__.get("forward")
        self.active = True

    @property
    def inner(self) -> Call:
        """The forward that this one stands in for."""
        return self.previous or type(self.module).forward.__get__(self.module)

    def take_off(self) -> None:
        """Put back what it stands in for; under a wrapper that came since it stays, and passes all on."""
        self.active = False
        if self.module.__dict__.get("forward") is self:
            if self.previous is None:
                del self.module.__dict__["forward"]
            else:
                self.module.__dict__["forward"] = self.previous

    # Lengths are numbers on the host, which a compiled graph cannot have.
    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        boundaries = self.current() if self.active else None
        if boundaries is None:
            return self.inner(*args, **kwargs)
        arguments = dict(inspect.signature(type(self.module).forward).bind(self.module, *args, **kwargs).arguments)
        del arguments["self"]
        by_width = boundaries.scratch.get(PADDED)
        lengths = boundaries.lengths if by_width is None else by_width[arguments["position_ids"].shape[-1]]
        alike = _alike(self.module, lengths, arguments.get("layer_type"))
        run = functools.partial(_afresh, self.module, self.previous)
        return (_packed if by_width is None else _padded)(run, arguments, lengths, alike)


def per_document(model: nn.Module, current: Callable[[], Boundaries | None]) -> list[PerDocument]:
    """What is to stand in for the rotary modules of `model` that look at the whole row; nothing is put in place yet."""
    return [PerDocument(module, current) for module in model.modules() if looks_at_the_row(module)]


def start_afresh(model: nn.Module) -> None:
    """Let every rotary module of `model` forget what it has grown to, as a position of 0 makes it do."""
    for module in model.modules():
        if _is_rotary(module) and "dynamic" in str(getattr(module, "rope_type", "")):
            for call in _calls(module, [0]):
                _said(lambda given, module=module: module.forward(**given), call)


def looks_at_the_row(module: nn.Module) -> bool:
    """Whether a rotary module says something else of near positions once far ones stand beside them."""
    if not _is_rotary(module):
        return False
    return any(_changes_beyond(module, limit) for limit in sorted(_limits(module)))


def _changes_beyond(module: nn.Module, limit: int) -> bool:
    near = list(range(min(4, limit)))
    try:
        for alone, beside in zip(_calls(module, near), _calls(module, [*near, limit + limit // 4 + 3]), strict=True):
            said, again = (_tensors(_said(functools.partial(_afresh, module, None), call)) for call in (alone, beside))
            for one, other in zip(said, again, strict=True):
                if not torch.equal(one, other.narrow(_token_axis(other, len(near) + 1), 0, len(near))):
                    return True
    except _TAKES_IT_OTHERWISE:  # a table of frequencies that ends there
        return False
    return False


def _said(run: Call, call: dict[str, Any]) -> Any:
    """What a rotary says of plain positions, or, where it takes several axes of them (images), of three alike."""
    try:
        return run(call)
    except _TAKES_IT_OTHERWISE:
        return run(call | {"position_ids": call["position_ids"].expand(3, *call["position_ids"].shape)})


def _afresh(module: nn.Module, previous: Call | None, call: dict[str, Any]) -> Any:
    """What a copy of `module` says that has seen nothing yet; the module's own state is left alone."""
    first = call | {"position_ids": torch.zeros_like(call["position_ids"][..., :1])}
    unbound = type(module).forward if previous is None else getattr(previous, "__func__", None)
    if unbound is None:  # somebody's function, bound to this very module: at least it forgets before and after
        assert previous is not None
        previous(**first)
        said = previous(**call)
        previous(**first)
        return said
    clone = copy.copy(module)
    clone.__dict__.pop("forward", None)
    clone._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    unbound(clone, **first)
    return unbound(clone, **call)


def _alike(module: nn.Module, lengths: np.ndarray, kind: str | None) -> np.ndarray:
    """[N]: documents of one value get the same frequencies, as transformers' rules say; of other rules, equal lengths."""
    rule, parameters = (
        getattr(module, "rope_type", None),
        getattr(getattr(module, "config", None), "rope_parameters", {}),
    )
    if kind is not None and isinstance(rule, Mapping):
        rule, parameters = rule[kind], parameters[kind]
    if rule == "longrope" and "original_max_position_embeddings" in parameters:
        return lengths > parameters["original_max_position_embeddings"]
    if rule == "dynamic" and isinstance(limit := getattr(module, "original_max_seq_len", None), int):
        return np.maximum(lengths, limit)
    return lengths


def _packed(run: Call, arguments: dict[str, Any], lengths: np.ndarray, alike: np.ndarray) -> Any:
    """Documents that lie in a packed row [.., rows, T/rows]."""
    positions, x = arguments["position_ids"], arguments["x"]
    rows, width = positions.shape[-2:]
    if rows * width != lengths.sum():  # one row of positions for all rows of the batch
        rows = int(lengths.sum()) // width
        positions = positions.expand(*positions.shape[:-2], rows, width)
    flat = positions.flatten(-2)[..., None, :]
    document = np.repeat(np.arange(lengths.size), lengths)
    order, parts = [], []
    for value in np.unique(alike):
        where = np.flatnonzero(alike[document] == value)
        # The states are read for their type and device alone, so any of them will do.
        states = x.flatten(0, 1)[None, : where.size]
        parts.append(run(arguments | {"x": states, "position_ids": flat[..., torch.from_numpy(where).to(flat.device)]}))
        order.append(where)

    def join(tensors: list[torch.Tensor]) -> torch.Tensor:
        axis = _token_axis(tensors[0], order[0].size)
        joined = torch.cat(tensors, dim=axis).index_select(axis, _inverse(order, flat.device))
        return joined.squeeze(axis - 1).unflatten(axis - 1, (rows, width))

    return _joined(parts, join)


def _padded(run: Call, arguments: dict[str, Any], lengths: np.ndarray, alike: np.ndarray) -> Any:
    """Documents that lie in a padded batch [.., documents or 1, width]."""
    positions = arguments["position_ids"]
    positions = positions.expand(*positions.shape[:-2], lengths.size, positions.shape[-1])
    last = torch.from_numpy(lengths - 1).to(positions.device)[:, None].expand(*positions.shape[:-1], 1)
    # Padding stands behind the document, where no token sees it; its positions must not make the document longer.
    positions = torch.minimum(positions, positions.gather(-1, last))
    order = [np.flatnonzero(alike == value) for value in np.unique(alike)]
    parts = [
        run(arguments | {"position_ids": positions[..., torch.from_numpy(rows).to(positions.device), :]})
        for rows in order
    ]

    def join(tensors: list[torch.Tensor]) -> torch.Tensor:
        axis = _token_axis(tensors[0], positions.shape[-1]) - 1
        return torch.cat(tensors, dim=axis).index_select(axis, _inverse(order, positions.device))

    return _joined(parts, join)


def _inverse(order: list[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.argsort(np.concatenate(order))).to(device)


def _joined(parts: list[Any], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> Any:
    if isinstance(parts[0], torch.Tensor):
        return join(parts)
    return type(parts[0])(join([part[i] for part in parts]) for i in range(len(parts[0])))


def _tensors(said: Any) -> list[torch.Tensor]:
    return [said] if isinstance(said, torch.Tensor) else list(said)


def _token_axis(said: torch.Tensor, tokens: int) -> int:
    """The axis of cos, sin or complex frequencies, [.., batch, tokens, D], that counts tokens."""
    if said.ndim < 3 or said.shape[-2] != tokens:
        raise ValueError(
            f"rotary frequencies of {tokens} tokens have shape {list(said.shape)}, expected [.., tokens, D]"
        )
    return said.ndim - 2


def _is_rotary(module: nn.Module) -> bool:
    """Whether a module makes something of positions alone: no weights, no parts, states `x` read for their type only."""
    taken = inspect.signature(type(module).forward).parameters
    return not module._modules and not module._parameters and {"x", "position_ids"} <= set(taken)


def _calls(module: nn.Module, positions: list[int]) -> Iterator[dict[str, Any]]:
    """Arguments for a call on `positions`, one for every kind of layer that the module tells apart."""
    device = next((buffer.device for buffer in module._buffers.values() if buffer is not None), None)
    call = {
        "x": torch.zeros(1, len(positions), 1, device=device),
        "position_ids": torch.tensor([positions], device=device),
    }
    kinds = getattr(module, "rope_type", None)
    if "layer_type" in inspect.signature(type(module).forward).parameters and isinstance(kinds, Mapping):
        yield from (call | {"layer_type": kind} for kind in kinds)
    else:
        yield call


def _limits(module: nn.Module) -> set[int]:
    """Every number of tokens that a rotary module or its configuration names and frequencies could depend on."""
    found: set[int] = set()

    def collect(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                collect(value)
            elif type(value) is int and ("max" in name or "original" in name) and 0 < value <= _FURTHEST:
                found.add(value)

    config = getattr(module, "config", None)
    collect({name: value for name, value in vars(module).items() if not name.startswith("_")})
    collect({} if config is None else vars(config))
    return found
