"""How often a method was called while something was done: which way renderings went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

from sft_plugins.masking.rendering.template import ChatRenderer

T = TypeVar("T")


def counting(owner: type, method: str, function: Callable[[], T]) -> tuple[T, int]:
    """What `function` gives, and how often it had `method` of an `owner` called."""
    calls = 0
    own = getattr(owner, method)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return own(self, *args, **kwargs)

    with mock.patch.object(owner, method, counted):
        return function(), calls


def counting_plain_ones(function: Callable[[], T]) -> tuple[T, int]:
    """… and how many renderings went the plain way, with no shortcut."""
    return counting(ChatRenderer, "_plainly", function)
