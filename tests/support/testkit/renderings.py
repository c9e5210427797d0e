"""How often a conversation is rendered as transformers renders it, with no shortcut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

from sft_plugins.masking.rendering.template import ChatRenderer

T = TypeVar("T")


def counting_plain_ones(function: Callable[[], T]) -> tuple[T, int]:
    """What `function` gives, and how many renderings went the plain way."""
    calls = 0
    plain = ChatRenderer._plainly

    def counted(self: ChatRenderer, *args: Any, **flags: Any) -> str:
        nonlocal calls
        calls += 1
        return plain(self, *args, **flags)

    with mock.patch.object(ChatRenderer, "_plainly", counted):
        return function(), calls
