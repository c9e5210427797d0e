"""One message of a conversation: its texts, and what makes it well formed.

    {"from": "gpt", "value": "Hi"}   {"role": "assistant", "content": [{"type": "text", "text": "Hi"}], "train": True}
        both  →  Message {"role": "assistant", "content": "Hi"}

A key that columnar storage filled with `None` never reaches a chat template.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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


# Names that reasoning has in the answers of some services, and no chat template of theirs reads.
_THOUGHTS = (
    "thought", "thoughts", "think", "thinking_blocks", "thinking_content", "reasoning_details", "reasoning_text",
    "reasoning_summary", "rationale", "chain_of_thought", "cot", "scratchpad",
)  # fmt: skip
# An answer that is meant to go on (Mistral's and Moonshot's interfaces): a stop token behind it would be wrong.
_UNFINISHED = ("prefix", "partial")
# Of the keys of a message, those that are read, here or by the caller, or that only name something.
_ACCOUNTED = {"role", "content", "tool_calls", *REASONING_KEYS, "tool_call_id"}


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


def unread_keys(messages: Iterable[Message], names: Collection[str]) -> list[str]:
    """Keys of messages that a chat template which looks up `names` does not read, each once."""
    found = dict.fromkeys(key for message in messages if len(message) > 2 for key in message)
    return [f"messages[].{key}" for key in found if key not in _ACCOUNTED and key not in names]


def message_texts(message: Message) -> list[str]:
    """Every free text of a message that a template may render: content, reasoning, tool-call names and arguments."""
    content = message.get("content")
    if len(message) == 2 and isinstance(content, str):  # and a role, which every message has
        return [content] if content else []
    texts = [content_text(content)]
    texts += reasoning_texts(message)
    for call in message.get("tool_calls") or ():
        texts += tool_call_texts(call)
    return [text for text in texts if text]


def other_texts(message: Message) -> list[str]:
    """The texts of a message besides `message_texts`: its name, ids of calls, whatever else a template may render."""
    known = ("role", "content", "tool_calls", *REASONING_KEYS)
    if len(message) == 2 and "content" in message:  # and a role, which every message has
        return []
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
    _check_unfinished(message, where)
    if content.text is None and not calls and not reasoning_texts(message):
        raise schema_error(f"{where} has no content.", "Give it a string, or remove the message.")
    return Said(message, _train(raw, content.train, where, role))


def check_thoughts(message: Message, where: str, names: Collection[str]) -> None:
    """Raises:
    MaskingError: `bad_schema` for reasoning that stands under a name that nobody reads, and under no other.
    """
    for key in _THOUGHTS:
        if key in message and key not in names and not is_blank(message[key]) and not reasoning_texts(message):
            raise schema_error(
                f"{where} has `{key}`, and reasoning is not read from there.",
                f"Call it `reasoning_content` (text), or name it in {ignoring(key)} to train the answer without it.",
            )


def _check_unfinished(message: Message, where: str) -> None:
    for key in _UNFINISHED:
        if message.get(key) not in (None, False, 0, ""):
            raise schema_error(
                f"{where} has `{key}`={message[key]!r}: the answer goes on, and training would end it there.",
                f"Give the whole answer, or name it in {ignoring(key)} if it is whole.",
            )


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
