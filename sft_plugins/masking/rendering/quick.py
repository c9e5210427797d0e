"""A chat template rendered as `apply_chat_template` renders it, in a third of its time or less.

apply_chat_template     copies messages and tools at every call, and its sandbox examines every `message.role`
here                    the same program in the same sandbox, on the row's own values, its keys looked up at once;
                        and what one run of it says of all conversations of a shape (`traced.py`)

That both write the same is held to on the first rendering and on one in `EVERY` after it; see `template.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from jinja2.environment import Template
from transformers import PreTrainedTokenizerBase

from sft_plugins.masking.examples.values import Written
from sft_plugins.masking.rendering.environment import PLAIN, aliased, quick_environment
from sft_plugins.masking.rendering.traced import Trace, TracedConversation, TracedTemplate

EVERY = 64  # renderings: of one in so many a shortcut is held to the plain one


class QuickTemplate:
    """A chat template, compiled once.

    Attributes:
        renderings: how often it has been asked.
        usable: not any more once it was found to write something else than `apply_chat_template`.
    """

    def __init__(self, source: str) -> None:
        self.renderings, self.usable = 0, True
        self.template: Template | None = None
        with suppress(TemplateError):  # named when the row is rendered plainly
            self.template = _compiled(source)
        self._traced = TracedTemplate(source)

    def look(self, messages: Sequence[Any], variables: dict[str, Any]) -> QuickConversation | None:
        """At a conversation, once for all of its beginnings; None where transformers would show a template something else."""
        if self.template is None or not (_are_plain(messages) and is_plain(variables)):
            return None
        messages = aliased(messages)
        return QuickConversation(self, messages, variables, self._traced.look(messages, variables))


class QuickConversation:
    """A conversation as transformers hands it to a template, and what the template can look up besides."""

    def __init__(
        self, quick: QuickTemplate, messages: Sequence[Any], variables: dict[str, Any], traced: TracedConversation
    ) -> None:
        self.quick, self._messages, self._variables, self.traced = quick, messages, variables, traced

    def trace(self, end: int, generation_prompt: bool) -> Trace | None:
        """The trace that gives the first `end` messages."""
        return self.traced.trace(end, generation_prompt, otherwise=self._rendered) if end else None

    def render(self, end: int, generation_prompt: bool) -> str | None:
        """The first `end` messages; None where there are none or the template complains: the plain way says why."""
        if not end:
            return None
        self.quick.renderings += 1
        return self.traced.render(end, generation_prompt, otherwise=self._rendered)

    def _rendered(self, end: int, generation_prompt: bool) -> str | None:
        template = self.quick.template
        assert template is not None
        try:
            return template.render(
                {**self._variables, "add_generation_prompt": generation_prompt, "messages": self._messages[:end]}
            )
        except Exception:
            return None


@lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    """Once, however many maskers are made for it."""
    return quick_environment(source).from_string(source)


# Names that `apply_chat_template` gives a meaning of its own.
TAKEN = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


def has_plain_way(tokenizer: Any) -> bool:
    """Whether conversations are rendered by transformers' own method, which is what `QuickTemplate` repeats."""
    own = getattr(getattr(tokenizer, "apply_chat_template", None), "__func__", None)
    return own is PreTrainedTokenizerBase.apply_chat_template


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
    return kind in PLAIN
