"""One message of a conversation: its texts, and what makes it well formed.

    {"from": "gpt", "value": "Hi"}   {"role": "assistant", "content": [{"type": "text", "text": "Hi"}], "train": True}
        both  →  Message {"role": "assistant", "content": "Hi"}

A key that columnar storage filled with `None` never reaches a chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from sft_plugins.masking.examples.content import content_text, read_content
from sft_plugins.masking.examples.flags import AMBIGUOUS_FLAGS, FLAGS, train_flag
from sft_plugins.masking.examples.roles import CALL, role_of
from sft_plugins.masking.examples.tools import (
    read_calls,
    read_function_call,
    read_written_calls,
    tool_call_texts,
)
from sft_plugins.masking.examples.values import drop_none, ignoring, is_blank, leaves, schema_error

Message: TypeAlias = dict[str, Any]

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_READ = {"role", "from", "content", "value", "tool_calls", "function_call", *FLAGS, *AMBIGUOUS_FLAGS}
# Keys that hold what was said or shown, which no template renders from there.
_UNREADABLE = (
    "refusal", "parts", "function_calls", "functions", "tools", "tool_use", "tool_result", "tool_results", "context",
    "documents", "image", "images", "audio", "audios", "video", "videos", "input_audio",
)  # fmt: skip


class Said(NamedTuple):
    """A message, and whether its data says that it carries loss (None: does not say)."""

    message: Message
    train: bool | None


def read_messages(raw: Sequence[Mapping[str, Any]], roles: Mapping[str, str], *, first: int = 0) -> list[Said]:
    """The messages of a conversation, `first` the number of the first of them.

    Calls that follow one another, each a message of its own, are one assistant's turn.

    Raises:
        MaskingError: `bad_schema`.
    """
    said: list[Said] = []
    after_call = False
    for index, message in enumerate(raw, first):
        role = role_of(message, index, roles)
        one = _read(message, index, role)
        if role == CALL and after_call and not one.message.get("content") and said[-1].train == one.train:
            said[-1].message["tool_calls"] += one.message["tool_calls"]
        else:
            said.append(one)
        after_call = role == CALL
    return said


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


def reasoning_texts(message: Message) -> list[str]:
    """What stands under the names that reasoning has. Columnar storage may give a message all of them, most empty."""
    return [message[key] for key in REASONING_KEYS if isinstance(message.get(key), str) and message[key]]


def _read(raw: Mapping[str, Any], index: int, role: str) -> Said:
    if len(raw) == 2 and role != CALL and isinstance(content := raw.get("content"), str) and "role" in raw:
        return Said({"role": role, "content": content}, None)  # nothing else to read, as in most data
    where = f"message {index} ({'assistant' if role == CALL else role})"
    written = _content(raw, where)
    calls = read_calls(raw.get("tool_calls"), where) + read_function_call(raw.get("function_call"), where)
    if role == CALL:
        thought, own = read_written_calls(written, where)
        role, written, calls = "assistant", thought or None, own + calls
    content = read_content(written, where, role=role)
    message: Message = {"role": role}
    message |= {
        key: value if isinstance(value, str) else drop_none(value)
        for key, value in raw.items()
        if value is not None and key not in _READ
    }
    if content.text is not None:
        message["content"] = content.text
    if content.reasoning:
        if reasoning_texts(message):
            raise schema_error(f"{where} has reasoning among its parts and beside them.", "Keep one of them.")
        message["reasoning_content"] = content.reasoning
    if calls:
        if role != "assistant":
            raise schema_error(f"{where} has calls, and only an assistant calls.", "Correct its role.")
        message["tool_calls"] = calls
    for key in _UNREADABLE:
        if key in message and not is_blank(message[key]):
            raise schema_error(
                f"{where} has `{key}`, which no chat template renders from there.",
                f"Write it into `content` or `tool_calls`, or name it in {ignoring(key)}.",
            )
    if content.text is None and not calls and not reasoning_texts(message):
        raise schema_error(f"{where} has no content.", "Give it a string, or remove the message.")
    return Said(message, _train(raw, content.train, where, role))


def _content(raw: Mapping[str, Any], where: str) -> Any:
    content, value = raw.get("content"), raw.get("value")
    if content is not None and value is not None and content != value:
        raise schema_error(
            f"{where} has both `content` and `value`.", "Remove one of them; neither is left out silently."
        )
    return value if content is None else content


def _train(raw: Mapping[str, Any], parts: bool | None, where: str, role: str) -> bool | None:
    own = train_flag(raw, where, role=role)
    if own is not None and parts is not None and own != parts:
        raise schema_error(f"{where} contradicts its parts on whether it carries loss.", "Keep one of the flags.")
    return parts if own is None else own
