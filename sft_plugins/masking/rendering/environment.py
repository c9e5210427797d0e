"""transformers' own environment for chat templates, with the look-ups that templates are full of done at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2.environment import Environment
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace
from transformers.utils import chat_template_utils

_OF_DICT = frozenset(dir(dict))
_OF_STR = frozenset(name for name in dir(str) if name[0] != "_") - {"format", "format_map"}  # which the sandbox wraps
_OF_LOOP = frozenset(
    {"index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem", "depth"}
)
PLAIN = (str, int, float, bool, type(None))


def quick_environment(source: str) -> Environment:
    """A copy of transformers' environment that looks `message.role` and `loop.first` up at once, with the same outcome.

    The sandbox asks a dictionary for the attribute first, and for the key once Python has failed to find one; and whatever it
    gets it examines at length. Of what is listed above it allows every access.
    """
    environment = chat_template_utils._compile_jinja_template(source).environment

    class Quick(type(environment)):  # type: ignore[misc]
        def getattr(self, obj: Any, attribute: str) -> Any:
            kind = type(obj)
            if kind is dict and attribute not in _OF_DICT:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
            if (kind is str and attribute in _OF_STR) or (kind is LoopContext and attribute in _OF_LOOP):
                return getattr(obj, attribute)
            if issubclass(kind, Namespace) and attribute[:1] != "_":
                value = getattr(obj, attribute, None)
                if value is not None and type(value) in PLAIN:
                    return value
            return super().getattr(obj, attribute)

    quick = environment.overlay()
    quick.__class__ = Quick
    return quick


def aliased(messages: Sequence[Any]) -> Sequence[Any]:
    """transformers ≥ 5.20 shows templates a message's reasoning under every name in use."""
    alias = getattr(chat_template_utils, "_alias_reasoning_fields", None)
    return alias(messages) if alias else messages
