"""The packed forward in progress, and how its layers find it again when checkpointing recomputes them.

Invariant: `current_boundaries()` is that of the packed forward on this thread, recompute included, whatever other threads
run through the same model meanwhile; in every other forward it is None.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sft_plugins.packing.isolation.boundaries import Boundaries

Call = Callable[..., Any]
Switch = Callable[[], AbstractContextManager[None]]

ENTRIES = "_sft_plugins_entries"
"""Attribute of a module that `forward.install` put an entry on."""

_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""What transformers' layers and torch's CheckpointWrapper call as function(run, *args, **kwargs)."""


@dataclass
class Frame:
    """One packed forward in progress."""

    modules: list[nn.Module]
    """Those of the module that the host called, it first."""
    boundaries: Boundaries
    switch: Switch
    run: Call
    """The backend's, which stands in for the backbone's forward."""
    in_backbone: bool = False

    def __post_init__(self) -> None:
        self.with_gradients = torch.is_grad_enabled()
        self._ids = {id(module) for module in self.modules}

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` runs in this forward; another model's may be called on the way."""
        return id(module) in self._ids


_FRAME: ContextVar[Frame | None] = ContextVar("sft_plugins_packed_forward", default=None)
_FOLLOWED: ContextVar[bool] = ContextVar("sft_plugins_followed_checkpoint", default=False)
_ORDINARY: ContextVar[nn.Module | None] = ContextVar("sft_plugins_ordinary_forward", default=None)


def current_frame() -> Frame | None:
    """The packed forward in progress on this thread."""
    return _FRAME.get()


def current_boundaries() -> Boundaries | None:
    """Boundaries of the packed forward in progress on this thread, recompute included; None in any other forward."""
    frame = _FRAME.get()
    return None if frame is None else frame.boundaries


def recompute_leaves() -> bool:
    """Whether what runs now is checkpointed by something that `running` does not follow: its recompute has no frame."""
    frame = _FRAME.get()
    if frame is None or not frame.with_gradients or _FOLLOWED.get():
        return False
    if not torch.is_grad_enabled():
        return _in_autograd_function()  # the first run of a reentrant checkpoint
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top is None else top(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def _in_autograd_function() -> bool:
    """Whether a custom function of autograd runs, as in every reentrant checkpoint; a model's own `no_grad` is none."""
    apply, caller = torch.autograd.Function.apply.__func__.__code__, sys._getframe()
    while caller.f_back is not None:
        caller = caller.f_back
        if caller.f_code is apply:
            return True
    return False


@contextmanager
def running(frame: Frame) -> Iterator[None]:
    """Run `frame`'s forward here, and its recompute on whatever thread, long after."""
    with _resumed(frame), _carried(frame.modules):
        yield


def is_ordinary(model: nn.Module) -> bool:
    """Whether a forward of `model` that was found to be an ordinary one is in progress on this thread."""
    return _ORDINARY.get() is model


@contextmanager
def ordinary(model: nn.Module) -> Iterator[None]:
    """Run an ordinary forward of `model`."""
    token = _ORDINARY.set(model)
    try:
        yield
    finally:
        _ORDINARY.reset(token)


@contextmanager
def _resumed(frame: Frame) -> Iterator[None]:
    token = _FRAME.set(frame)
    try:
        with frame.switch():
            yield
    finally:
        _FRAME.reset(token)


_LOCK = threading.Lock()
_CARRIED: dict[tuple[int, str], list[Any]] = {}
"""(module, attribute) → how many packed forwards run, and what stood there before the first of them."""


@contextmanager
def _carried(modules: list[nn.Module]) -> Iterator[None]:
    """Let checkpointing recompute layers inside the frame that they ran in. Other threads' forwards have none."""
    if not torch.is_grad_enabled():
        yield
        return
    held = []
    with _LOCK:
        for module in modules:
            for name, carry in _checkpoints(module):
                key = (id(module), name)
                if key not in _CARRIED:
                    _CARRIED[key] = [0, module.__dict__[name], carry]
                    module.__dict__[name] = carry
                _CARRIED[key][0] += 1
                held.append((module, name))
    try:
        yield
    finally:
        with _LOCK:
            for module, name in held:
                entry = _CARRIED[id(module), name]
                entry[0] -= 1
                if entry[0] == 0:
                    del _CARRIED[id(module), name]
                    if module.__dict__.get(name) is entry[2]:
                        module.__dict__[name] = entry[1]


def _checkpoints(module: nn.Module) -> Iterator[tuple[str, Call]]:
    """What a layer is checkpointed with, and what is to stand there for it."""
    values = module.__dict__
    for name in _CHECKPOINTS:
        if callable(checkpoint := values.get(name)):
            yield name, functools.partial(_inside, checkpoint)
    # layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    by_hand = values.get("forward")
    if isinstance(by_hand, functools.partial) and is_checkpoint(by_hand.func):
        yield "forward", functools.partial(_inside, by_hand.func, *by_hand.args, **by_hand.keywords)


def is_checkpoint(function: Any) -> bool:
    """Whether `function` is torch's checkpointing, or ours around it."""
    return function is _inside or getattr(function, "__module__", None) == "torch.utils.checkpoint"


def _inside(checkpoint: Call, function: Call, *args: Any, **kwargs: Any) -> Any:
    """`checkpoint(function, *args, **kwargs)`, recomputed in the frame that it is called in."""
    frame = _FRAME.get()
    if frame is None:
        return checkpoint(function, *args, **kwargs)

    def inside(*args: Any, **kwargs: Any) -> Any:
        token = _FOLLOWED.set(True)
        try:
            with _resumed(frame):
                return function(*args, **kwargs)
        finally:
            _FOLLOWED.reset(token)

    return checkpoint(inside, *args, **kwargs)
