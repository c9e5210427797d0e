"""A configuration that names another attention implementation on this thread, and its own on every other.

Invariant: nothing is written to a configuration, so that none can go on naming what it was lent, whatever threads do.

transformers' layers read `config._attn_implementation`, a property of the class. While a packed forward runs anywhere, its
getter looks first at what the forward on this thread names; when the last one has ended, the class is as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_PROPERTY = "_attn_implementation"
_NAMED: ContextVar[Mapping[int, str] | None] = ContextVar("sft_plugins_named_attention", default=None)
_LOCK = threading.Lock()
_LENT: dict[type, list[Any]] = {}
"""Class of configuration → its own property, and how many forwards have lent it another."""


@contextmanager
def named_here(configs: list[Any], implementation: str) -> Iterator[None]:
    """Let `configs` name `implementation` on this thread, inside."""
    owners = {_owner(type(config)) for config in configs}
    token = _NAMED.set({**(_NAMED.get() or {}), **{id(config): implementation for config in configs}})
    with _LOCK:
        for owner in owners:
            if owner not in _LENT:
                own = owner.__dict__[_PROPERTY]
                _LENT[owner] = [own, 0]
                setattr(owner, _PROPERTY, _reading_first(own))
            _LENT[owner][1] += 1
    try:
        yield
    finally:
        with _LOCK:
            for owner in owners:
                _LENT[owner][1] -= 1
                if _LENT[owner][1] == 0:
                    setattr(owner, _PROPERTY, _LENT.pop(owner)[0])
        _NAMED.reset(token)


def _owner(cls: type) -> type:
    """The class that defines the property."""
    return next(base for base in cls.__mro__ if _PROPERTY in base.__dict__)


def _reading_first(own: property) -> property:
    # A compiled graph reads no context.
    @torch.compiler.disable
    def read(config: Any) -> Any:
        named = (_NAMED.get() or {}).get(id(config))
        return own.__get__(config) if named is None else named

    return property(read, own.fset)
