"""How the boundaries of a packed forward get into a model, whichever way the host calls it.

Invariant: while a packed forward runs, its gradient-checkpointing recompute included, `current_boundaries()` is that
forward's boundaries; in every other forward it is None, and the model runs as if nothing were installed.

Hosts call the causal LM as a module, or its `.forward` directly (PEFT 0.20, where module hooks do not fire), or the
backbone alone (TRL's fused heads). So `install` replaces `.forward` on the instances of all of them, and whichever is
reached first takes the boundary keys out of the batch. Class, parameters, config and state dict stay as they were.

A backend is an object with a `name`, `keep_keys`, `open` and `run` (see `Backend`). Inside a packed forward
`run(call, arguments, boundaries)` stands in for the backbone's forward: it may call `call` with other arguments
(documents as a padded batch, say; nested backbones are then left alone) and returns the packed output.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from sft_plugins._models import refuse_context_parallel
from sft_plugins.packing.isolation.backends.rotary import PerDocument, per_document
from sft_plugins.packing.isolation.boundaries import Boundaries, malformed
from sft_plugins.packing.isolation.reading import refuse_other_names, take_boundaries

_MARK, _ENTRY = "_sft_plugins_isolation", "_sft_plugins_entry"

Call = Callable[..., Any]
Switch = Callable[[], AbstractContextManager[None]]


class Backend(Protocol):
    """What makes documents exact. Instances are pickled and deep-copied with the model: keep no live state in them."""

    name: str
    keep_keys: bool
    """Whether the model's own code reads `cu_seq_lens_q/k`, `max_length_q/k` and `seq_idx`, so they are passed on."""

    def open(self, module: nn.Module, boundaries: Boundaries) -> Switch:
        """A factory of contexts that hold while layers of `module` run, in the forward and in each recompute."""

    def run(self, call: Call, arguments: dict[str, Any], boundaries: Boundaries) -> Any:
        """Run the backbone, `call(**arguments)`, on the packed arguments and return its packed output."""


@dataclass
class _Frame:
    """One packed forward in progress."""

    root: nn.Module
    boundaries: Boundaries
    switch: Switch
    in_backbone: bool = False


_FRAME: ContextVar[_Frame | None] = ContextVar("sft_plugins_packed_forward", default=None)


def current_boundaries() -> Boundaries | None:
    """Boundaries of the packed forward in progress on this thread, recompute included; None in any other forward."""
    frame = _FRAME.get()
    return None if frame is None else frame.boundaries


class Entry:
    """Stands in for `module.forward`.

    A plain object that refers to its module, so that `copy.deepcopy` and pickling of the module carry it over to the
    copy; a closure would go on calling the original.
    """

    def __init__(self, module: nn.Module, backend: Backend, *, is_backbone: bool) -> None:
        self.module, self.backend, self.is_backbone = module, backend, is_backbone
        self.previous: Call | None = module.__dict__.get("forward")
        self.active = True

    @property
    def inner(self) -> Call:
        """The forward that this one stands in for."""
        return self.previous or type(self.module).forward.__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        # Trainers read the columns that a model takes from the signature of its forward.
        return inspect.signature(self.inner)

    @property
    def __func__(self) -> _Unbound:
        # What a bound method has: TRL 1.9 reads its signature, accelerate wraps it for autocast and binds it again.
        return _Unbound(self.previous, type(self.module).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _enter(self, args, kwargs) if self.active else self.inner(*args, **kwargs)


class _Unbound:
    """An entry without its module, which comes as the first argument: it may be a copy of the one it was taken from."""

    def __init__(self, previous: Call | None, forward: Call) -> None:
        self.previous = previous
        self.__signature__ = inspect.signature(forward)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (entry := module.__dict__.get(_ENTRY)) is not None:
            return entry(*args, **kwargs)
        return (self.previous or type(module).forward.__get__(module))(*args, **kwargs)


# Reading boundaries needs numbers on the host, which a compiled graph cannot have; what lies inside still compiles.
@torch.compiler.disable(recursive=False)
def _enter(entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    frame = _FRAME.get()
    if frame is not None and any(module is entry.module for module in frame.root.modules()):
        if not entry.is_backbone or frame.in_backbone:
            return entry.inner(*args, **kwargs)
        return _run_backbone(entry, frame, _named(entry.__signature__, args, kwargs))

    signature = entry.__signature__
    arguments = _named(signature, args, kwargs)
    inputs = arguments.get("input_ids")
    inputs = inputs if inputs is not None else arguments.get("inputs_embeds")
    if inputs is None or inputs.ndim == 0:
        return entry.inner(*args, **kwargs)
    refuse_other_names(arguments, signature.parameters)
    rows, tokens = inputs.shape[:2] if inputs.ndim > 1 else (1, inputs.shape[0])
    boundaries = take_boundaries(arguments, rows=rows, tokens=tokens)
    if boundaries is None:
        return entry.inner(*args, **kwargs)
    if inputs.ndim == 1:
        raise malformed(f"input_ids of a packed row have shape {[tokens]}, expected {[1, tokens]}")
    refuse_context_parallel()

    if entry.backend.keep_keys:
        arguments |= _accepted(signature, boundaries.keys(inputs.device))
    if not entry.is_backbone:
        arguments |= _without_cache(signature)
    if "position_ids" not in _accepted(signature, arguments):
        del arguments["position_ids"]
    frame = _Frame(entry.module, boundaries, entry.backend.open(entry.module, boundaries))
    with _resume(frame), _recompute_inside(frame):
        return _run_backbone(entry, frame, arguments) if entry.is_backbone else entry.inner(**arguments)


def _run_backbone(entry: Entry, frame: _Frame, arguments: dict[str, Any]) -> Any:
    arguments |= _without_cache(entry.__signature__)
    frame.in_backbone = True
    try:
        return entry.backend.run(entry.inner, arguments, frame.boundaries)
    finally:
        frame.in_backbone = False


@contextmanager
def _resume(frame: _Frame) -> Iterator[None]:
    token = _FRAME.set(frame)
    try:
        with frame.switch():
            yield
    finally:
        _FRAME.reset(token)


@contextmanager
def _recompute_inside(frame: _Frame) -> Iterator[None]:
    """Let gradient checkpointing recompute its layers inside `frame`, from whatever thread, long after the forward."""
    patched: list[tuple[nn.Module, str, Any]] = []
    if torch.is_grad_enabled():
        for module in frame.root.modules():
            # transformers' layers, and torch's CheckpointWrapper; both call it as func(function, *args, **kwargs)
            for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
                if callable(checkpoint := module.__dict__.get(name)):
                    patched.append((module, name, checkpoint))
                    module.__dict__[name] = functools.partial(_checkpoint_inside, frame, checkpoint)
    try:
        yield
    finally:
        for module, name, checkpoint in patched:
            module.__dict__[name] = checkpoint


def _checkpoint_inside(frame: _Frame, checkpoint: Call, function: Call, *args: Any, **kwargs: Any) -> Any:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with _resume(frame):
            return function(*args, **kwargs)

    return checkpoint(inside, *args, **kwargs)


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; what the forward does not know stays, for it to accept or refuse."""
    positional = [name for name, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return dict(zip(positional, args, strict=False)) | kwargs


def _accepted(signature: inspect.Signature, arguments: dict[str, Any]) -> dict[str, Any]:
    """The part of `arguments` that a forward of this signature takes."""
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in signature.parameters}


def _without_cache(signature: inspect.Signature) -> dict[str, Any]:
    # A cache made inside the forward switches transformers' own isolation off, and nothing reads it.
    return _accepted(signature, {"use_cache": False})


def backbones(model: nn.Module) -> list[nn.Module]:
    """The modules below the LM head that a host, or the causal LM itself, may call: base model and decoder.

    `get_decoder()` gives the model itself for some (Llama 4, Mllama: there the backbone is a plain child), and the output
    projection for ModernBERT's decoder; `base_model` may be a wrapper that takes anything (Bart). Those take no tokens.
    """
    found: list[nn.Module] = []
    for candidate in (_base_model(model), _decoder(model), _decoder(_base_model(model))):
        if candidate is not model and _takes_tokens(candidate) and all(candidate is not other for other in found):
            found.append(candidate)
    return found or [child for child in model.children() if _takes_tokens(child)][:1]


def _takes_tokens(module: nn.Module) -> bool:
    return "input_ids" in inspect.signature(module.forward).parameters


def _base_model(model: nn.Module) -> nn.Module:
    return getattr(model, "base_model", model)


def _decoder(model: nn.Module) -> nn.Module:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def install(model: nn.Module, backend: Backend) -> Callable[[], None]:
    """Put `backend` on a causal LM (unwrapped) in place of what is installed, and return what takes it off again."""
    uninstall(model)
    entries: list[Entry | PerDocument] = [Entry(model, backend, is_backbone=False)]
    entries += [Entry(module, backend, is_backbone=True) for module in backbones(model)]
    entries += per_document(model, current_boundaries)
    for entry in entries:
        entry.module.__dict__["forward"] = entry.module.__dict__[_ENTRY] = entry
    model.__dict__[_MARK] = entries
    return functools.partial(_take_off, model, entries)


def uninstall(model: nn.Module) -> None:
    """Take off whatever backend is installed; nothing happens where none is."""
    if entries := model.__dict__.get(_MARK):
        _take_off(model, entries)


def installed_backend(model: nn.Module) -> Backend | None:
    """The backend installed on a causal LM (unwrapped)."""
    entries = model.__dict__.get(_MARK)
    return entries[0].backend if entries else None


def _take_off(model: nn.Module, entries: list[Entry | PerDocument]) -> None:
    for entry in entries:
        # Where a host has wrapped the forward since, this entry stays inside as a plain pass-through.
        entry.active = False
        if entry.module.__dict__.get(_ENTRY) is entry:
            del entry.module.__dict__[_ENTRY]
        if entry.module.__dict__.get("forward") is entry:
            if entry.previous is None:
                del entry.module.__dict__["forward"]
            else:
                entry.module.__dict__["forward"] = entry.previous
    if model.__dict__.get(_MARK) is entries:
        del model.__dict__[_MARK]
