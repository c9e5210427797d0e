"""The form in which a template takes a conversation: the first in which its rendering holds every text.

    text        a string, or a list of one part        {{ m.content }}   or   {% for part in m.content %}{{ part.text }}
    arguments   a mapping, or JSON text of it          {{ call.arguments | tojson }}   or   {{ '…' + call.arguments }}
    tools       as given, or {"type": "function", "function": …} around them
    no content  left out, or ""

A form is tried on marks in place of the texts, once per shape of conversation. A list or a mapping that is printed as
Python prints it is no rendering of its text, nor is JSON text that was made JSON once more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from sft_plugins.errors import MaskingError
from sft_plugins.masking.coverage.planting import outline, plant
from sft_plugins.masking.coverage.skeleton import Skeleton
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.messages import Message
from sft_plugins.masking.rendering.template import ChatRenderer

_REMEMBERED = 4096
_AS_PRINTED = re.compile(r"""['"]text['"]: ?['"]Zq\d{5}qZ|'Zq\d{5}qZ': |\\+"Zq\d{5}qZ""")
_ALL_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_PART_ROLES = (frozenset[str](), _ALL_ROLES, frozenset({"user"}), _ALL_ROLES - {"system", "developer"})


class Form(NamedTuple):
    """What is given otherwise than as strings and mappings. The first of all, `Form()`, is the usual one."""

    parts: frozenset[str] = frozenset()  # roles whose text is given as a part
    json_arguments: bool = False
    wrapped_tools: bool = False
    empty_content: bool = False

    def of(self, conversation: Conversation) -> Conversation:
        """`conversation` in this form."""
        if self == Form():
            return conversation
        tools = conversation.tools
        if self.wrapped_tools and tools:
            tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        return replace(conversation, messages=[self._message(one) for one in conversation.messages], tools=tools)

    def _message(self, message: Message) -> Message:
        made = dict(message)
        if self.empty_content:
            made.setdefault("content", "")
        if message["role"] in self.parts and isinstance(made.get("content"), str):
            made["content"] = [{"type": "text", "text": made["content"]}]
        if self.json_arguments and "tool_calls" in made:
            made["tool_calls"] = [_with_json_arguments(call) for call in made["tool_calls"]]
        return made

    @property
    def changes(self) -> tuple[str, ...]:
        """What is given otherwise than usual, by its name in the report's `CHANGES`."""
        given = {
            "text_as_parts": bool(self.parts), "arguments_as_text": self.json_arguments,
            "tools_wrapped": self.wrapped_tools, "content_empty": self.empty_content,
        }  # fmt: skip
        return tuple(name for name, changed in given.items() if changed)


class Forms:
    """Chooses the form for each shape of conversation, and remembers it."""

    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer = renderer
        self._chosen: dict[Hashable, Form] = {}

    def choose(self, conversation: Conversation) -> Form:
        """The form for `conversation`, `Form()` where none renders all of it: what is lost is then told of that one."""
        trained = [index for index, flag in enumerate(conversation.trainable) if flag]
        if not trained or not self._renderer.available:
            return Form()
        end = trained[-1] + 1
        shape, _ = outline(conversation, end)
        if shape not in self._chosen:
            if len(self._chosen) > _REMEMBERED:
                self._chosen.clear()
            self._chosen[shape] = self._search(conversation, end)
        return self._chosen[shape]

    def _search(self, conversation: Conversation, end: int) -> Form:
        most, best = -1, Form()
        for form in _candidates(conversation, end):
            planted = plant(form.of(conversation), end)
            wanted = {n for n, slot in enumerate(planted.slots) if slot.needed == "always"}
            wanted |= {n for n, slot in enumerate(planted.slots) if slot.needed == "own" and slot.owner == end - 1}
            try:
                rendered = self._renderer.render(
                    planted.conversation.messages, planted.conversation, generation_prompt=False
                )
            except MaskingError:  # not this form
                continue
            found = -0.5 if _AS_PRINTED.search(rendered) else len(wanted.intersection(Skeleton.of(rendered).order))
            if found > most:
                most, best = int(found), form
            if found == len(wanted):
                break
        return best


def _candidates(conversation: Conversation, end: int) -> Iterator[Form]:
    messages = conversation.messages[:end]
    calls = any(message.get("tool_calls") for message in messages)
    bare_tools = any("function" not in tool for tool in conversation.tools or ())
    no_content = any("content" not in message for message in messages)
    choices: tuple[tuple[bool, ...], ...] = tuple(
        (False, True) if needed else (False,) for needed in (calls, bare_tools, no_content)
    )
    forms = [Form(parts, *others) for parts in _PART_ROLES for others in product(*choices)]
    yield from sorted(forms, key=lambda form: len(form.changes))


def _with_json_arguments(call: Message) -> Message:
    function = call["function"]
    if isinstance(function["arguments"], str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
