"""A conversation with marks in place of its texts, so that a rendering shows where each of them stands.

    user       "2 + 2?"                  →   "Zq00000qZ"
    assistant  "<think>hm</think>4"      →   "<think>Zq00001qZ</think>Zq00002qZ"

Marked are contents, reasoning, names and arguments of calls, results, documents, and of each tool its name, descriptions and
parameters. What a template may decide by stays as it is: roles, types, thinking tags, whether a text is blank. Two
conversations that differ in marked texts alone have the same `shape`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.messages import REASONING_KEYS, Message

THINK_TAG = re.compile(r"(</?think>|</?seed:think>|\[/?THINK\])")
# As long as Mistral's ids of calls, and in the order of their numbers for templates that sort.
MARK = re.compile(r"Zq(\d{5})qZ|98(\d{5})89(?:\.5)?")
TOOLS, DOCUMENTS = -1, -2


class Slot(NamedTuple):
    """A text that was replaced by a mark.

    Attributes:
        owner: index of its message; `TOOLS`, `DOCUMENTS`.
        what: in words.
        text: the text as the data has it.
        needed: "always"; "own": in the turn itself, while history may leave it out (reasoning); "never" (ids).
    """

    owner: int
    what: str
    text: Any
    needed: str = "always"

    def spellings(self) -> Iterator[str]:
        """How a template may write it, white space at its ends aside: as it stands, or as JSON."""
        if not isinstance(self.text, str):
            yield from dict.fromkeys((json.dumps(self.text), str(self.text)))
            return
        yield self.text.strip()
        for ascii_only in (False, True):
            yield json.dumps(self.text, ensure_ascii=ascii_only)[1:-1]
            yield json.dumps(self.text.strip(), ensure_ascii=ascii_only)[1:-1]


class Planted(NamedTuple):
    """A conversation whose texts are marks; `slots[n]` is what mark n stands for."""

    conversation: Conversation
    slots: list[Slot]


def plant(conversation: Conversation, end: int, *, behind: bool = False, only: int | None = None) -> Planted:
    """`conversation.messages[:end]` with marks in place of its texts, or `behind` them; then maybe of one owner's `only`.

    Marks are numbered in the order of their places, messages last, so that what is planted before a message is the same
    whatever follows.
    """
    planting = _Planting(behind, only)
    tools, kwargs = planting.around(conversation)
    messages = [planting.message(i, message) for i, message in enumerate(conversation.messages[:end])]
    return Planted(replace(conversation, messages=messages, tools=tools, template_kwargs=kwargs), planting.slots)


def outline(conversation: Conversation, end: int) -> tuple[Hashable, list[Slot]]:
    """Shape and slots of `conversation.messages[:end]`; equal shapes are equal planted conversations."""
    if Outline not in conversation.kept:
        conversation.kept[Outline] = Outline(conversation)
    found: Outline = conversation.kept[Outline]
    return found.until(end)


class Outline:
    """Shapes and slots of all beginnings of a conversation, each message planted once."""

    def __init__(self, conversation: Conversation) -> None:
        self._messages = conversation.messages
        self._planting = _Planting(behind=False, only=None)
        self._around = repr(self._planting.around(conversation))
        self._shapes: list[str] = []
        self._slots = [len(self._planting.slots)]  # before each message

    def until(self, end: int) -> tuple[Hashable, list[Slot]]:
        slots = self._planting.slots
        for index in range(len(self._shapes), end):
            message = self._messages[index]
            content, role = message.get("content"), message["role"]
            if len(message) == 2 and isinstance(content, str) and content.strip() and not _thinks(content, role):
                self._shapes.append(role)  # at less cost: a text between a role and nothing else
                slots.append(Slot(index, "content", content))
            else:
                self._shapes.append(repr(self._planting.message(index, message)))
            self._slots.append(len(slots))
        return (self._around, *self._shapes[:end]), slots[: self._slots[end]]


def _thinks(text: str, role: str) -> bool:
    return role == "assistant" and len(think_pieces(text)) > 1


def think_pieces(text: str) -> list[str]:
    """`text` cut at its thinking tags: text, tag, text, tag, … text."""
    return THINK_TAG.split(text) if "<" in text or "[" in text else [text]


class _Planting:
    def __init__(self, behind: bool, only: int | None) -> None:
        self.slots: list[Slot] = []
        self._behind, self._only = behind, only
        self._identifiers: dict[str, str] = {}

    def mark(self, owner: int, what: str, text: Any, needed: str = "always") -> Any:
        number = len(self.slots)
        self.slots.append(Slot(owner, what, text, needed))
        if self._behind:
            if not isinstance(text, str) or self._only not in (None, owner):
                return text
            bare = text.rstrip()
            return f"{bare}Zq{number:05}qZ{text[len(bare) :]}"
        if isinstance(text, str):
            return f"Zq{number:05}qZ"
        whole = int(f"98{number:05}89")
        return whole if isinstance(text, int) else whole + 0.5

    def around(self, conversation: Conversation) -> tuple[Any, dict[str, Any]]:
        """Tools and arguments of the template."""
        tools = conversation.tools and [self.tool(tool) for tool in conversation.tools]
        kwargs = dict(conversation.template_kwargs)
        if kwargs.get("documents"):
            kwargs["documents"] = [self.document(document) for document in kwargs["documents"]]
        return tools, kwargs

    def message(self, index: int, message: Message) -> Message:
        made: Message = {}
        for key, value in message.items():
            if key == "content":
                made[key] = self._content(index, value, message["role"])
            elif key in REASONING_KEYS and isinstance(value, str) and value.strip():
                made[key] = self.mark(index, "reasoning", value, "own")
            elif key == "tool_calls":
                made[key] = [self._call(index, call) for call in value]
            elif key == "tool_call_id" and isinstance(value, str):
                made[key] = self._identifier(value)
            elif key == "name" and isinstance(value, str) and message["role"] == "tool":
                made[key] = self.mark(index, "name", value, "never")
            else:
                made[key] = value
        return made

    def tool(self, tool: Mapping[str, Any]) -> Any:
        if not isinstance(tool.get("function"), Mapping):
            return self._schema(tool)
        return {key: self._schema(value) if key == "function" else value for key, value in tool.items()}

    def document(self, document: Mapping[str, Any]) -> Any:
        return {
            key: self.mark(DOCUMENTS, f"document's {key}", value) if isinstance(value, str) and value.strip() else value
            for key, value in document.items()
        }

    def _content(self, index: int, content: Any, role: str) -> Any:
        if isinstance(content, list):
            return [{**part, "text": self._text(index, part["text"], role)} for part in content]
        return self._text(index, content, role)

    def _text(self, index: int, text: str, role: str) -> str:
        pieces = think_pieces(text) if role == "assistant" else [text]
        closed = max((i for i, piece in enumerate(pieces) if i % 2 and "/" in piece), default=-1)
        return "".join(
            self.mark(index, "reasoning" if i < closed else "content", piece, "own" if i < closed else "always")
            if i % 2 == 0 and piece.strip()
            else piece
            for i, piece in enumerate(pieces)
        )

    def _call(self, index: int, call: Mapping[str, Any]) -> Any:
        function = call["function"]
        made = dict(call)
        arguments = function.get("arguments")
        written = isinstance(arguments, str)
        name = self.mark(index, "name of a call", function["name"])
        planted = self._arguments(index, json.loads(arguments) if written else arguments)
        made["function"] = {
            **function,
            "name": name,
            "arguments": json.dumps(planted, ensure_ascii=False) if written else planted,
        }
        if isinstance(call.get("id"), str):
            made["id"] = self._identifier(call["id"])
        return made

    def _arguments(self, index: int, value: Any) -> Any:
        if isinstance(value, Mapping):
            # Numbered in the order of their names, for templates that sort them.
            names = {key: self.mark(index, "argument", key) for key in sorted(value, key=lambda key: str(key).lower())}
            return {names[key]: self._arguments(index, item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._arguments(index, item) for item in value]
        if isinstance(value, bool) or value is None or (isinstance(value, str) and not value.strip()):
            return value
        return self.mark(index, "argument", value)

    def _identifier(self, value: str) -> str:
        if value not in self._identifiers:
            self._identifiers[value] = self.mark(TOOLS, "id", value, "never")
        return self._identifiers[value]

    def _schema(self, schema: Mapping[str, Any], *, top: bool = True) -> Any:
        properties = schema.get("properties")
        names: dict[str, Any] = {}
        if isinstance(properties, Mapping):
            names = {
                key: self.mark(TOOLS, "parameter", key) for key in sorted(properties, key=lambda key: str(key).lower())
            }
        made: dict[str, Any] = {}
        for key, value in schema.items():
            if key == "properties" and names:
                made[key] = {
                    names[name]: self._schema(item, top=False) if isinstance(item, Mapping) else item
                    for name, item in value.items()
                }
            elif key == "required" and isinstance(value, list):
                made[key] = [names.get(name, name) if isinstance(name, str) else name for name in value]
            elif (key == "description" or (key == "name" and top)) and isinstance(value, str) and value.strip():
                made[key] = self.mark(TOOLS, f"{key} of a tool", value)
            elif key in ("parameters", "input_schema", "items") and isinstance(value, Mapping):
                made[key] = self._schema(value, top=False)
            else:
                made[key] = value
        return made
