"""Rows as people have them → one of three forms the encoder understands. Nothing is tokenised or rendered here.

    messages | conversations | prompt+completion lists | Alpaca   →  Conversation
    prompt+response | prompt+completion strings                  →  TextPair
    input_ids (+ labels, completion_mask, assistant_masks)       →  Tokenized

Two invariants: a role or column nobody knows is an error, never a row that trains nothing; and a key that columnar storage
filled with `None` never reaches a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from sft_plugins.errors import MaskingError
from sft_plugins.masking.tokenized import Tokenized, parse_tokenized

Message: TypeAlias = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip

ACCEPTED_COLUMNS = (
    "`prompt`+`response` or `prompt`+`completion` (strings or message lists), `messages`, `conversations`, "
    "`instruction`(+`input`)+`output`, or `input_ids` with `labels`, `completion_mask` or `assistant_masks`"
)


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template; `trainable[i]` says whether message i is to carry loss."""

    messages: list[Message]
    trainable: list[bool]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def texts(self) -> list[str]:
        """Every free text of each message (`message_texts`), joined by NUL."""
        return ["\0".join(message_texts(message)) for message in self.messages]


@dataclass(frozen=True)
class TextPair:
    """Two texts trained as they stand, without a chat template."""

    prompt: str
    response: str


Example: TypeAlias = Conversation | TextPair | Tokenized


def parse_example(row: Mapping[str, Any], *, has_chat_template: bool) -> Example:
    """Recognise the form of `row`.

    Raises:
        MaskingError: `bad_schema` for unknown columns, roles and types; `length_mismatch` for masks of another length.
    """
    if not isinstance(row, Mapping):
        raise _schema(f"a row must be a mapping of columns, got {type(row).__name__}.", f"Use {ACCEPTED_COLUMNS}.")
    present = {key for key, value in row.items() if value is not None}
    if "input_ids" in present:
        return parse_tokenized(row)
    if "messages" in present:
        return _conversation(row, _messages(row["messages"], "messages"))
    if "conversations" in present:
        turns = _messages(row["conversations"], "conversations")
        return _conversation(row, [_from_sharegpt(turn, index) for index, turn in enumerate(turns)])
    answer = next((key for key in ("response", "completion") if key in present), None)
    if "prompt" in present and answer:
        return _prompt_and_answer(row, answer)
    if {"instruction", "output"} <= present:
        return _from_alpaca(row, has_chat_template)
    found = ", ".join(f"`{key}`" for key in sorted(map(str, row))) or "none"
    missing = f" All of {found} are None." if row and not present else ""
    raise _schema(f"no known row form: found columns {found}.{missing}", f"Use {ACCEPTED_COLUMNS}.")


def message_texts(message: Message) -> list[str]:
    """Every free text of a message that a template may render: content, reasoning, tool-call names and arguments."""
    texts = [content_text(message.get("content"))]
    texts += [message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)]
    for call in message.get("tool_calls") or ():
        texts += tool_call_texts(call)
    return [text for text in texts if text]


def content_text(content: Any) -> str:
    """The text of a message's content: a string, or the `text` parts of a list joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(part.get("text", "") for part in content)
    return ""


def reasoning_text(message: Message) -> str:
    return next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), "")


def tool_call_texts(call: Mapping[str, Any]) -> list[str]:
    """Name and argument leaves of one tool call; arguments given as a JSON string are read."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return [str(function.get("name", "")), arguments]
    return [str(function.get("name", "")), *_leaves(arguments)]


def _leaves(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in (str(key), *_leaves(item))]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _leaves(item)]
    return [value] if isinstance(value, str) else []


def _conversation(row: Mapping[str, Any], messages: list[Message], *, first_trainable: int = 0) -> Conversation:
    if not messages:
        raise _schema("the conversation has no messages.", "Remove the row or give it at least one user and assistant.")
    cleaned, trainable = [], []
    for index, raw in enumerate(messages):
        flag = _train_flag(raw, index)
        message = _clean_message(raw, index)
        trainable.append(message["role"] == "assistant" and flag and index >= first_trainable)
        cleaned.append(message)
    conversation = Conversation(
        messages=cleaned,
        trainable=trainable,
        tools=_tools(row.get("tools")),
        template_kwargs=_template_kwargs(row.get("chat_template_kwargs")),
    )
    for index, text in enumerate(conversation.texts):
        check_text(text, f"message {index} ({cleaned[index]['role']})")
    return conversation


def _messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise _schema(f"`{column}` is a string that is not JSON ({error}).", "Give a list of messages.") from error
    if not isinstance(value, (list, tuple)):
        raise _schema(f"`{column}` must be a list of messages, got {type(value).__name__}.", "Give a list of messages.")
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise _schema(
                f"`{column}[{index}]` must be a mapping with `role` and `content`, got {type(message).__name__}.",
                'Write {"role": "user", "content": "…"}.',
            )
    return list(value)


def _from_sharegpt(turn: Message, index: int) -> Message:
    if "from" not in turn:  # `conversations` that are OpenAI messages already
        return dict(turn)
    speaker = turn["from"]
    if speaker not in _SHAREGPT_ROLES:
        raise _schema(
            f"unknown speaker {speaker!r} in `conversations[{index}]`; known: {', '.join(_SHAREGPT_ROLES)}.",
            "Rename it: a misspelt speaker would train nothing.",
        )
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message["role"] = _SHAREGPT_ROLES[speaker]
    if speaker != "function_call":
        return {**message, "content": turn.get("value")}
    try:
        calls = json.loads(turn["value"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise _schema(
            f"`conversations[{index}]` is a `function_call` whose value is not JSON ({error}).",
            'Give {"name": …, "arguments": {…}} or a list of those.',
        ) from error
    calls = calls if isinstance(calls, list) else [calls]
    return {**message, "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _prompt_and_answer(row: Mapping[str, Any], answer: str) -> Example:
    prompt, response = row["prompt"], row[answer]
    if isinstance(prompt, str) and isinstance(response, str):
        return TextPair(prompt, response)
    if isinstance(prompt, str) or isinstance(response, str):
        raise _schema(
            f"`prompt` is {type(prompt).__name__} and `{answer}` is {type(response).__name__}.",
            "Give two strings, or two lists of messages.",
        )
    before, after = _messages(prompt, "prompt"), _messages(response, answer)
    return _conversation(row, before + after, first_trainable=len(before))


def _from_alpaca(row: Mapping[str, Any], has_chat_template: bool) -> Example:
    """With a chat template, what a chat will ask later; without one, the prompt of the Stanford Alpaca recipe."""
    instruction, extra, output = (_string(row, key) for key in ("instruction", "input", "output"))
    if has_chat_template:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        user = {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}
        return _conversation(row, [*system, user, {"role": "assistant", "content": output}])
    if extra:
        intro = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
        )
        prompt = f"{intro}### Instruction:\n{instruction}\n\n### Input:\n{extra}\n\n### Response:"
    else:
        intro = (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
        )
        prompt = f"{intro}### Instruction:\n{instruction}\n\n### Response:"
    return TextPair(prompt, output)


def _string(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None and key == "input":
        return ""
    if not isinstance(value, str):
        raise _schema(f"`{key}` must be a string, got {type(value).__name__}.", "Convert it, or drop the row.")
    return value


def _train_flag(message: Message, index: int) -> bool:
    """Per-message `weight` (0 or 1) or `train` (bool); trained where neither is given."""
    for key, allowed in (("weight", (0, 1)), ("train", (False, True))):
        value = message.get(key)
        if value is None:
            continue
        if value not in allowed or (key == "train" and not isinstance(value, bool)):
            raise _schema(
                f"message {index} has `{key}`={value!r}; allowed: {allowed[0]!r} or {allowed[1]!r}.",
                "Fractional weights are not supported: a token either carries loss or does not.",
            )
        return bool(value)
    return True


def _clean_message(raw: Message, index: int) -> Message:
    role = raw.get("role")
    if role not in ROLES:
        raise _schema(
            f"message {index} has the unknown role {role!r}; known: {', '.join(ROLES)}.",
            "Rename it: a misspelt role would train nothing.",
        )
    message = {
        key: value if isinstance(value, str) else drop_none(value)
        for key, value in raw.items()
        if value is not None and key not in ("weight", "train")
    }
    content = message.get("content")
    if content is None and not message.get("tool_calls") and not reasoning_text(message):
        raise _schema(f"message {index} ({role}) has no content.", "Give it a string, or remove the message.")
    if isinstance(content, (list, tuple)):
        _check_parts(content, index, role)
    elif content is not None and not isinstance(content, str):
        raise _schema(
            f"message {index} ({role}) has content of type {type(content).__name__}.", "Content must be a string."
        )
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, (list, tuple)) and all(map(_is_call, calls))):
        raise _schema(
            f"message {index} ({role}): `tool_calls` must be a list of mappings that name a function.",
            'Write [{"type": "function", "function": {"name": …, "arguments": {…}}}].',
        )
    return message


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _check_parts(parts: Sequence[Any], index: int, role: str) -> None:
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _schema(
                f"message {index} ({role}) has multimodal content (a part of type {kind!r}).",
                "Only text is supported; fine-tune vision and audio models with their own collator.",
            )


def check_text(text: str, where: str) -> None:
    """Refuse lone surrogates: they cannot be encoded as UTF-8, and tokenizers fail on them without saying where."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _schema(
            f"{where} holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}.",
            "Repair the text's encoding, for example with .encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').",
        ) from error


def drop_none(value: Any) -> Any:
    """`value` without the mapping entries that are `None`, at every depth. Arrow fills missing struct fields with them."""
    if isinstance(value, Mapping):
        return {key: drop_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [drop_none(item) for item in value]
    return value


def _tools(value: Any) -> list[Any] | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise _schema(f"`tools` is a string that is not JSON ({error}).", "Give a list of schemas.") from error
    if not isinstance(value, (list, tuple)):
        raise _schema(f"`tools` must be a list of schemas, got {type(value).__name__}.", "See OpenAI's format.")
    return [drop_none(json.loads(tool) if isinstance(tool, str) else tool) for tool in value] or None


def _template_kwargs(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _schema(f"`chat_template_kwargs` must be a mapping, got {type(value).__name__}.", "Give keyword values.")
    return {key: item for key, item in value.items() if item is not None}


def _schema(message: str, remedy: str) -> MaskingError:
    return MaskingError(message, code="bad_schema", remedy=remedy)
