"""Whether a model is still the one that was proved: adapters and forwards that were put on since are noticed.

Invariant: a packed forward runs on modules whose forwards are those of the last proof, or on a proof made anew.

Not noticed is what leaves every module and every forward as it was: weights, buffers, hooks, plain attributes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType, MethodType
from typing import Any

from torch import nn

from sft_plugins._models import is_sharded
from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.frame import ENTRIES, is_checkpoint

Shape = list[tuple[nn.Module, Any, Any]]

_PER_TOKEN = ("peft.tuners.lora.", "torch.nn.")
"""Where modules come from that may be put into a sharded model unproved: they work on each token by itself."""

_PROVING: ContextVar[bool] = ContextVar("sft_plugins_proving", default=False)


class Proof:
    """What a model was when its isolation was proved, and how to prove it anew.

    Copies and pickles keep no shape: the first packed forward of a copy proves it.
    """

    def __init__(self, prove: Callable[[nn.Module], None], shape: Shape | None) -> None:
        self.prove, self.shape = prove, shape

    def __getstate__(self) -> dict[str, Any]:
        return {"prove": self.prove, "shape": None}

    def renew(self, model: nn.Module) -> None:
        """Prove `model` again if it is no longer what was proved.

        Raises:
            ContaminationError: what `prove` raises; `changed_since_proof`, where a sharded model cannot be proved from within.
        """
        if _PROVING.get():
            return
        shape = shape_of(model)
        if self.shape is not None and _same(shape, self.shape):
            return
        if is_sharded(model):
            _refuse_unknown(shape, self.shape)
        else:
            with proving():
                self.prove(model)
        self.shape = shape


@contextmanager
def proving() -> Iterator[None]:
    """Packed forwards inside belong to a proof, and ask for no other."""
    token = _PROVING.set(True)
    try:
        yield
    finally:
        _PROVING.reset(token)


def shape_of(model: nn.Module) -> Shape:
    """Every module of `model` with the forward of its class and its own; sharding's wrappers aside."""
    return [
        (module, forward, _own(module, forward))
        for module in model.modules()
        if not str(getattr(forward := _class_of(module).forward, "__module__", "")).startswith("torch.distributed")
    ]


def _class_of(module: nn.Module) -> Any:
    """The class that a module had before it was sharded: FSDP2 derives one of (FSDPModule, its class) for each."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = fsdp is not None and isinstance(module, fsdp.FSDPModule)
    return type(module).__bases__[-1] if sharded else type(module)


def _own(module: nn.Module, of_class: Any) -> Any:
    """What was put in place of a module's forward; None where it does the same: our own, or checkpointing of the class's."""
    if ENTRIES in module.__dict__:
        return None  # reached through whatever a host wrapped around it
    own = module.__dict__.get("forward")
    while hasattr(own, "previous"):
        own = own.previous
    if isinstance(own, functools.partial) and is_checkpoint(own.func):
        own = next((part for part in own.args if isinstance(part, MethodType)), own)
    return None if isinstance(own, MethodType) and own.__func__ is of_class else own


def _same(one: Shape, other: Shape) -> bool:
    return len(one) == len(other) and all(
        a is b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def _refuse_unknown(shape: Shape, proved: Shape | None) -> None:
    known = {id(module): (module, forward, own) for module, forward, own in proved or shape}
    for module, forward, own in shape:
        if id(module) in known:
            _, before, own_before = known[id(module)]
            per_token = forward is before and own is own_before
        else:
            per_token = str(getattr(forward, "__module__", "")).startswith(_PER_TOKEN) and own is None
        if not per_token:
            raise ContaminationError(
                f"{type(module).__name__} was put into the model, or its forward replaced, since isolation was proved, and a "
                "sharded model cannot be proved in the middle of a forward",
                code="changed_since_proof",
                remedy="call isolate(model) when all adapters are on it and before it is sharded",
            )


def refuse_prompt_learning() -> None:
    """Raise inside a forward of PEFT that puts virtual tokens before the row, and drops positions on the way.

    Raises:
        ContaminationError: `prompt_learning`.
    """
    if (peft := sys.modules.get("peft.peft_model")) is None:
        return
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        if caller.f_code.co_name == "forward" and caller.f_code.co_filename == peft.__file__:
            config = caller.f_locals["self"].active_peft_config
            if config.is_prompt_learning:
                raise ContaminationError(
                    f"{type(config).__name__} was put on since the model was isolated: it puts virtual tokens before the row, "
                    "where only its first document would see them, and drops the positions that tell documents apart",
                    code="prompt_learning",
                    remedy="{no_packing_or_lora:train without packing, or with LoRA}; without packing take the isolation off, "
                    "`report.undo()`",
                )
        caller = caller.f_back
