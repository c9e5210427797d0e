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
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from sft_plugins._models import refuse_context_parallel
from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.backends.rotary import PerDocument, per_document
from sft_plugins.packing.isolation.boundaries import Boundaries, malformed
from sft_plugins.packing.isolation.changes import Proof, refuse_prompt_learning, shape_of
from sft_plugins.packing.isolation.frame import (
    ENTRIES,
    Call,
    Frame,
    Switch,
    current_boundaries,
    current_frame,
    is_ordinary,
    ordinary,
    running,
)
from sft_plugins.packing.isolation.reading import CACHES, refuse_other_names, take_boundaries
from sft_plugins.packing.isolation.trees import Trees

_MARK = "_sft_plugins_isolation"


class Backend(Protocol):
    """What makes documents exact. Instances are pickled and deep-copied with the model: keep no live state in them."""

    name: str
    keep_keys: bool
    """Whether the model's own code reads `cu_seq_lens_q/k`, `max_length_q/k` and `seq_idx`, so they are passed on."""
    trees: bool
    """Whether rows of trees were proved exact with this instance on its model; `isolate` says so."""

    def open(self, module: nn.Module, boundaries: Boundaries) -> Switch:
        """A factory of contexts that hold while layers of `module` run, in the forward and in each recompute."""

    def run(self, call: Call, arguments: dict[str, Any], boundaries: Boundaries) -> Any:
        """Run the backbone, `call(**arguments)`, on the packed arguments and return its packed output."""


@dataclass(eq=False)
class Layer:
    """One backend that `install` put on."""

    backend: Backend
    proof: Proof | None = None


class Entry:
    """Stands in for `module.forward`.

    A plain object that refers to its module, so that `copy.deepcopy` and pickling of the module carry it over to the
    copy; a closure would go on calling the original.
    """

    def __init__(self, module: nn.Module, model: nn.Module, layers: list[Layer]) -> None:
        self.module, self.model, self.layers, self.is_backbone = module, model, layers, module is not model
        self.previous: Call | None = module.__dict__.get("forward")
        # Copies of the model keep it: a wrapper that was copied with them finds the copy's entry by it.
        self.key = uuid.uuid4().hex

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "layers" not in state:  # of 0.1.0, which kept one backend and proved less
            raise ContaminationError(
                "the pickled model was isolated by an earlier version of this library, whose proof does not hold for this one",
                code="not_isolated",
                remedy="save its weights there (`save_pretrained`), load them here, and isolate the model anew",
            )
        self.__dict__.update(state)

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
        return _Unbound(self.key, self.previous, type(self.module).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):  # bound to its module once more, as accelerate does on unwrapping
            return self.__func__(*args, **kwargs)
        return _enter(self, args, kwargs) if self.layers else self.inner(*args, **kwargs)


class _Unbound:
    """An entry without its module, which comes as the first argument: it may be a copy of the one it was taken from."""

    def __init__(self, key: str, previous: Call | None, forward: Call) -> None:
        self.key, self.previous = key, previous
        self.__signature__ = inspect.signature(forward)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # By key: an entry that was put on since may stand outside of the wrapper that calls this.
        if (entry := module.__dict__.get(ENTRIES, {}).get(self.key)) is not None:
            return entry(*args, **kwargs)
        return (self.previous or type(module).forward.__get__(module))(*args, **kwargs)


# Reading boundaries needs numbers on the host, which a compiled graph cannot have; what lies inside still compiles.
@torch.compiler.disable(recursive=False)
def _enter(entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    frame = current_frame()
    if frame is not None and frame.holds(entry.module):
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
    # Inside an ordinary forward, masks of pairs are the model's own: those that wrap a text model make its windows so.
    own_masks = is_ordinary(entry.model)
    boundaries = take_boundaries(arguments, rows=rows, tokens=tokens, own_masks=own_masks)
    if boundaries is None:
        if arguments.get("input_ids") is None or any(arguments.get(name) is not None for name in CACHES):
            refuse_prompt_learning()
        with ordinary(entry.model):
            return entry.inner(*args, **kwargs)
    if inputs.ndim == 1:
        raise malformed(f"input_ids of a packed row have shape {[tokens]}, expected {[1, tokens]}")
    refuse_context_parallel()
    layer = entry.layers[-1]
    if layer.proof is not None:
        layer.proof.renew(entry.model)

    backend = layer.backend
    if isinstance(boundaries, Trees) and not backend.trees:
        raise ContaminationError(
            f"the row holds trees, and backend {backend.name} is not proved to keep their branches apart",
            code="prefix_trees",
            remedy="{no_trees:pack with share_prefixes=False}; the report of isolation notes what stands against trees",
        )
    if backend.keep_keys:
        arguments |= _accepted(signature, boundaries.keys(inputs.device))
    if not entry.is_backbone:
        arguments |= _without_cache(signature)
    if "position_ids" not in _accepted(signature, arguments):
        del arguments["position_ids"]
    frame = Frame(list(entry.module.modules()), boundaries, backend.open(entry.module, boundaries), backend.run)
    with running(frame):
        return _run_backbone(entry, frame, arguments) if entry.is_backbone else entry.inner(**arguments)


def _run_backbone(entry: Entry, frame: Frame, arguments: dict[str, Any]) -> Any:
    arguments |= _without_cache(entry.__signature__)
    frame.in_backbone = True
    try:
        return frame.run(entry.inner, arguments, frame.boundaries)
    finally:
        frame.in_backbone = False


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


class _Place:
    """One set of entries: on the causal LM and on what hosts call of it. The last of its layers is in charge."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Layer] = []
        self.entries = [Entry(model, model, self.layers)]
        self.entries += [Entry(module, model, self.layers) for module in backbones(model)]

    def is_outermost(self) -> bool:
        """Whether nothing was put around an entry since."""
        return all(entry.module.__dict__.get("forward") is entry for entry in self.entries)

    def put_on(self) -> None:
        for entry in self.entries:
            entry.module.__dict__["forward"] = entry
            entry.module.__dict__.setdefault(ENTRIES, {})[entry.key] = entry

    def take_off(self) -> None:
        """Where a host has wrapped the forward since, an entry stays inside, and without layers passes all on."""
        for entry in self.entries:
            values = entry.module.__dict__
            if values.get("forward") is entry:
                if entry.previous is None:
                    del values["forward"]
                else:
                    values["forward"] = entry.previous
            del values[ENTRIES][entry.key]
            for outer in values[ENTRIES].values():
                if outer.previous is entry:
                    outer.previous = entry.previous
            if not values[ENTRIES]:
                del values[ENTRIES]


@dataclass(eq=False)
class _Stack:
    """All that is installed on a causal LM, outermost last."""

    places: list[_Place]
    rotary: list[PerDocument]


def install(model: nn.Module, backend: Backend) -> Callable[[], None]:
    """Put `backend` in charge of a causal LM (unwrapped), over what is installed; return what takes it, and no other, off."""
    stack: _Stack | None = model.__dict__.get(_MARK)
    if stack is None:
        stack = model.__dict__[_MARK] = _Stack([], per_document(model, current_boundaries))
        for one in stack.rotary:
            one.module.__dict__["forward"] = one
    if not stack.places or not stack.places[-1].is_outermost():
        place = _Place(model)
        place.put_on()
        stack.places.append(place)
    layer = Layer(backend)
    stack.places[-1].layers.append(layer)
    return functools.partial(_take_off, model, stack.places[-1], layer)


def installed_backend(model: nn.Module) -> Backend | None:
    """The backend in charge of a causal LM (unwrapped)."""
    stack: _Stack | None = model.__dict__.get(_MARK)
    layers = [] if stack is None else stack.places[-1].layers
    return layers[-1].backend if layers else None


def proved(model: nn.Module, prove: Callable[[nn.Module], None]) -> None:
    """Note that what is in charge of `model` was proved on it as it is now; `prove` does it again when it has changed."""
    stack: _Stack | None = model.__dict__.get(_MARK)
    if stack is not None:
        stack.places[-1].layers[-1].proof = Proof(prove, shape_of(model))


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """The causal LM as it is without all that is installed, inside."""
    stack: _Stack | None = model.__dict__.get(_MARK)
    places = [] if stack is None else stack.places
    layers = [list(place.layers) for place in places]
    for place in places:
        place.layers.clear()
    try:
        yield
    finally:
        for place, before in zip(places, layers, strict=True):
            place.layers[:] = before


def _take_off(model: nn.Module, place: _Place, layer: Layer) -> None:
    if layer not in place.layers:
        return
    place.layers.remove(layer)
    if place.layers:
        return
    stack: _Stack = model.__dict__[_MARK]
    place.take_off()
    stack.places.remove(place)
    if not stack.places:
        for one in stack.rotary:
            one.take_off()
        del model.__dict__[_MARK]
