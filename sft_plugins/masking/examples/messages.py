"""One message of a conversation: its texts, and what makes it well formed.

A key that columnar storage filled with `None` never reaches a chat template; a role nobody knows is an error, never a message
that trains nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sft_plugins.errors import MaskingError

Message: TypeAlias = dict[str, Any]


class Written(dict[str, Any]):
    """A mapping read from JSON text. What is null in it somebody wrote; columnar storage fills no holes there."""


ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def clean_message(raw: Message, index: int) -> Message:
    role = raw.get("role")
    if role not in ROLES:
        raise schema_error(
            f"message {index} has the unknown role {role!r}; known: {', '.join(ROLES)}.",
            "Rename it: a misspelt role would train nothing.",
        )
    message = {
        key: value if isinstance(value, str) else drop_none(value)
        for key, value in raw.items()
        if value is not None and key not in ("weight", "train")
    }
    content = message.get("content")
    if message.get("function_call"):
        raise schema_error(
            f"message {index} ({role}) has a `function_call`, which chat templates no longer render.",
            'Write it as "tool_calls": [{"type": "function", "function": {"name": …, "arguments": {…}}}].',
        )
    if content is None and not message.get("tool_calls") and not reasoning_texts(message):
        raise schema_error(f"message {index} ({role}) has no content.", "Give it a string, or remove the message.")
    if isinstance(content, (list, tuple)):
        _check_parts(content, index, role)
    elif content is not None and not isinstance(content, str):
        raise schema_error(
            f"message {index} ({role}) has content of type {type(content).__name__}.", "Content must be a string."
        )
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, (list, tuple)) and all(map(_is_call, calls))):
        raise schema_error(
            f"message {index} ({role}): `tool_calls` must be a list of mappings that name a function.",
            'Write [{"type": "function", "function": {"name": …, "arguments": {…}}}].',
        )
    return message


def train_flag(message: Message, index: int) -> bool:
    """Per-message `weight` (0 or 1) or `train` (bool); trained where neither is given."""
    for key, allowed in (("weight", (0, 1)), ("train", (False, True))):
        value = message.get(key)
        if value is None:
            continue
        if value not in allowed or (key == "train" and not isinstance(value, bool)):
            raise schema_error(
                f"message {index} has `{key}`={value!r}; allowed: {allowed[0]!r} or {allowed[1]!r}.",
                "Fractional weights are not supported: a token either carries loss or does not.",
            )
        return bool(value)
    return True


def message_texts(message: Message) -> list[str]:
    """Every free text of a message that a template may render: content, reasoning, tool-call names and arguments."""
    texts = [content_text(message.get("content"))]
    texts += reasoning_texts(message)
    for call in message.get("tool_calls") or ():
        texts += tool_call_texts(call)
    return [text for text in texts if text]


def other_texts(message: Message) -> list[str]:
    """The texts of a message besides `message_texts`: its name, ids of calls, whatever else a template may render."""
    known = ("role", "content", "tool_calls", *REASONING_KEYS)
    return leaves({key: value for key, value in message.items() if key not in known})


def content_text(content: Any) -> str:
    """The text of a message's content: a string, or the `text` parts of a list joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(part.get("text", "") for part in content)
    return ""


def reasoning_texts(message: Message) -> list[str]:
    """What stands under the names that reasoning has. Columnar storage may give a message all of them, most empty."""
    return [message[key] for key in REASONING_KEYS if isinstance(message.get(key), str) and message[key]]


def tool_call_texts(call: Mapping[str, Any]) -> list[str]:
    """Name and argument leaves of one tool call; arguments given as a JSON string are read."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return [str(function.get("name", "")), arguments]
    return [str(function.get("name", "")), *leaves(arguments)]


def check_text(text: str, where: str) -> None:
    """Refuse lone surrogates: they cannot be encoded as UTF-8, and tokenizers fail on them without saying where."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise schema_error(
            f"{where} holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}.",
            "Repair the text's encoding, for example with .encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').",
        ) from error


def read_json(text: str) -> Any:
    """`json.loads`, with every mapping a `Written` one."""
    return json.loads(text, object_hook=Written)


def drop_none(value: Any) -> Any:
    """`value` without the mapping entries that are `None`, at every depth. Arrow fills missing struct fields with them.

    The arguments of a call that were read from JSON text keep theirs: a null among them is part of the answer.
    """
    if isinstance(value, Mapping):
        return {
            key: item if key == "arguments" and isinstance(item, Written) else drop_none(item)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, (list, tuple)):
        return [drop_none(item) for item in value]
    return value


def schema_error(message: str, remedy: str) -> MaskingError:
    return MaskingError(message, code="bad_schema", remedy=remedy)


def leaves(value: Any) -> list[str]:
    """The strings in `value` at every depth, keys of mappings included."""
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in (str(key), *leaves(item))]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in leaves(item)]
    return [value] if isinstance(value, str) else []


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _check_parts(parts: Sequence[Any], index: int, role: str) -> None:
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise schema_error(
                f"message {index} ({role}) has multimodal content (a part of type {kind!r}).",
                "Only text is supported; fine-tune vision and audio models with their own collator.",
            )
