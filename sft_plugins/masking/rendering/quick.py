"""A chat template rendered as `apply_chat_template` renders it, in a third of its time.

apply_chat_template     copies messages and tools at every call, and its sandbox examines every `message.role`
here                    the same program in the same sandbox, on the row's own values, its keys looked up at once

That both write the same is held to on the first rendering and on one in `EVERY` after it; see `template.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from jinja2 import TemplateError
from jinja2.environment import Environment, Template
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from sft_plugins.masking.examples.values import Written

EVERY = 64  # renderings: of one in so many a shortcut is held to the plain one
_OF_DICT = frozenset(dir(dict))
_OF_STR = frozenset(name for name in dir(str) if name[0] != "_") - {"format", "format_map"}  # which the sandbox wraps
_OF_LOOP = frozenset(
    {"index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem", "depth"}
)
_PLAIN = (str, int, float, bool, type(None))


class Given(NamedTuple):
    """A conversation as transformers hands it to a template, and what the template can look up besides."""

    messages: Sequence[Any]
    variables: dict[str, Any]


def given(messages: Sequence[Any], variables: dict[str, Any]) -> Given | None:
    """Looked at once for all beginnings of a conversation; None where transformers would hand over something else."""
    return Given(aliased(messages), variables) if _are_plain(messages) and is_plain(variables) else None


class QuickTemplate:
    """A chat template, compiled once.

    Attributes:
        renderings: how often it has been asked.
    """

    def __init__(self, source: str) -> None:
        self.renderings = 0
        self._template: Template | None = None
        with suppress(TemplateError):  # named when the row is rendered plainly
            self._template = quick_environment(source).from_string(source)

    def render(self, shown: Given, end: int, generation_prompt: bool) -> str | None:
        """The first `end` messages; None where there are none or the template complains: the plain way says why."""
        if self._template is None or not end:
            return None
        self.renderings += 1
        variables = {**shown.variables, "add_generation_prompt": generation_prompt, "messages": shown.messages[:end]}
        try:
            return self._template.render(variables)
        except Exception:
            return None


# Names that `apply_chat_template` gives a meaning of its own.
TAKEN = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


def has_plain_way(tokenizer: Any) -> bool:
    """Whether conversations are rendered by transformers' own method, which is what `QuickTemplate` repeats."""
    own = getattr(getattr(tokenizer, "apply_chat_template", None), "__func__", None)
    return own is PreTrainedTokenizerBase.apply_chat_template


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
                if value is not None and type(value) in _PLAIN:
                    return value
            return super().getattr(obj, attribute)

    quick = environment.overlay()
    quick.__class__ = Quick
    return quick


def aliased(messages: Sequence[Any]) -> Sequence[Any]:
    """transformers ≥ 5.20 shows templates a message's reasoning under every name in use."""
    alias = getattr(chat_template_utils, "_alias_reasoning_fields", None)
    return alias(messages) if alias else messages


def _are_plain(messages: Sequence[Any]) -> bool:
    """… and no null, which transformers ≥ 5.20 takes out of a message."""
    return all(type(one) is dict and None not in one.values() and is_plain(one) for one in messages)


def is_plain(value: Any) -> bool:
    """Whether transformers hands `value` to a template as it is, or a copy that no template can tell from it."""
    kind = type(value)
    if kind is dict or kind is Written:
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if kind is list:
        return all(map(is_plain, value))
    return kind in _PLAIN
