"""Rows as people have them → one of three forms the encoder understands. Nothing is tokenised or rendered here.

    messages | conversations | prompt+completion lists | Alpaca   →  Conversation   (a `system` column goes in front)
    prompt+response | prompt+completion strings                  →  TextPair
    input_ids (+ labels, completion_mask, assistant_masks)       →  Tokenized

A column or speaker nobody knows is an error, never a row that trains nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from sft_plugins.masking.examples.messages import (
    Message,
    Written,
    check_text,
    clean_message,
    drop_none,
    message_texts,
    read_json,
    schema_error,
    train_flag,
)
from sft_plugins.masking.examples.tokenized import Tokenized, parse_tokenized

_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")

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
        raise schema_error(f"a row must be a mapping of columns, got {type(row).__name__}.", f"Use {ACCEPTED_COLUMNS}.")
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
    raise schema_error(f"no known row form: found columns {found}.{missing}", f"Use {ACCEPTED_COLUMNS}.")


def _conversation(row: Mapping[str, Any], messages: list[Message], *, first_trainable: int = 0) -> Conversation:
    if not messages:
        raise schema_error(
            "the conversation has no messages.", "Remove the row or give it at least one user and assistant."
        )
    if system := _system(row):
        first = messages[0]
        if first.get("role") not in ("system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
            first_trainable += 1
        elif first.get("content") != system:
            raise schema_error(
                "the row has a `system` column and another system message.",
                "Remove one of them; neither is left out silently.",
            )
    cleaned, trainable = [], []
    for index, raw in enumerate(messages):
        flag = train_flag(raw, index)
        message = clean_message(raw, index)
        trainable.append(message["role"] == "assistant" and flag and index >= first_trainable)
        cleaned.append(message)
    if media := [name for name in _MEDIA if not _is_empty(row.get(name))]:
        raise schema_error(
            f"the row has `{media[0]}`, and only text is supported.",
            "Fine-tune vision and audio models with their own collator, or remove the column to train on the text alone.",
        )
    conversation = Conversation(
        messages=cleaned,
        trainable=trainable,
        tools=_tools(row.get("tools")),
        template_kwargs=_template_kwargs(row.get("chat_template_kwargs")),
    )
    for index, text in enumerate(conversation.texts):
        check_text(text, f"message {index} ({cleaned[index]['role']})")
    return conversation


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, Sized) and not len(value))


def _messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):
        try:
            value = read_json(value)
        except json.JSONDecodeError as error:
            raise schema_error(
                f"`{column}` is a string that is not JSON ({error}).", "Give a list of messages."
            ) from error
    if not isinstance(value, (list, tuple)):
        raise schema_error(
            f"`{column}` must be a list of messages, got {type(value).__name__}.", "Give a list of messages."
        )
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise schema_error(
                f"`{column}[{index}]` must be a mapping with `role` and `content`, got {type(message).__name__}.",
                'Write {"role": "user", "content": "…"}.',
            )
    return list(value)


def _from_sharegpt(turn: Message, index: int) -> Message:
    if "from" not in turn:  # `conversations` that are OpenAI messages already
        return dict(turn)
    speaker = turn["from"]
    if speaker not in _SHAREGPT_ROLES:
        raise schema_error(
            f"unknown speaker {speaker!r} in `conversations[{index}]`; known: {', '.join(_SHAREGPT_ROLES)}.",
            "Rename it: a misspelt speaker would train nothing.",
        )
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message["role"] = _SHAREGPT_ROLES[speaker]
    if speaker != "function_call":
        return {**message, "content": turn.get("value")}
    try:
        calls = read_json(turn["value"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise schema_error(
            f"`conversations[{index}]` is a `function_call` whose value is not JSON ({error}).",
            'Give {"name": …, "arguments": {…}} or a list of those.',
        ) from error
    calls = calls if isinstance(calls, list) else [calls]
    return {**message, "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _prompt_and_answer(row: Mapping[str, Any], answer: str) -> Example:
    prompt, response = row["prompt"], row[answer]
    if row.get("label") is False:
        raise schema_error(
            "the row has `label`=False, as preference data (KTO) marks an answer that is not wanted.",
            "Keep the rows whose label is True, or remove the column to train on all of them.",
        )
    if isinstance(prompt, str) and isinstance(response, str):
        return _text_pair(row, prompt, response)
    if isinstance(prompt, str) or isinstance(response, str):
        raise schema_error(
            f"`prompt` is {type(prompt).__name__} and `{answer}` is {type(response).__name__}.",
            "Give two strings, or two lists of messages.",
        )
    before, after = _messages(prompt, "prompt"), _messages(response, answer)
    return _conversation(row, before + after, first_trainable=len(before))


def _from_alpaca(row: Mapping[str, Any], has_chat_template: bool) -> Example:
    """With a chat template, what a chat will ask later; without one, the prompt of the Stanford Alpaca recipe."""
    instruction, extra, output = (_string(row, key) for key in ("instruction", "input", "output"))
    if row.get("history"):
        raise schema_error(
            "the row has a `history` of earlier turns, which Alpaca's form has no place for.", "Give it as `messages`."
        )
    if has_chat_template:
        user = {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}
        return _conversation(row, [user, {"role": "assistant", "content": output}])
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
    return _text_pair(row, prompt, output)


def _text_pair(row: Mapping[str, Any], prompt: str, response: str) -> TextPair:
    if _system(row):
        raise schema_error(
            "the row has a `system` column, and a prompt that is trained as it stands has no place for it.",
            "Put the text into the prompt, give the row as `messages`, or remove the column.",
        )
    return TextPair(prompt, response)


def _system(row: Mapping[str, Any]) -> str:
    """The system prompt that stands in a column of its own (ShareGPT, Alpaca), empty where there is none."""
    return _string(row, "system") if row.get("system") else ""


def _string(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None and key == "input":
        return ""
    if not isinstance(value, str):
        raise schema_error(f"`{key}` must be a string, got {type(value).__name__}.", "Convert it, or drop the row.")
    return value


def _tools(value: Any) -> list[Any] | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = read_json(value)
        except json.JSONDecodeError as error:
            raise schema_error(f"`tools` is a string that is not JSON ({error}).", "Give a list of schemas.") from error
    if not isinstance(value, (list, tuple)):
        raise schema_error(f"`tools` must be a list of schemas, got {type(value).__name__}.", "See OpenAI's format.")
    tools = [read_json(tool) if isinstance(tool, str) else tool for tool in value]
    # A null of a schema in JSON text ("default": null) is there at generation as well.
    return [tool if isinstance(tool, Written) else drop_none(tool) for tool in tools] or None


def _template_kwargs(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise schema_error(
            f"`chat_template_kwargs` must be a mapping, got {type(value).__name__}.", "Give keyword values."
        )
    return {key: item for key, item in value.items() if item is not None}
