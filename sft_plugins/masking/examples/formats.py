"""Rows as people have them → one of three forms the encoder understands. Nothing is tokenised or rendered here.

    messages | conversations | prompt+completion lists | Alpaca   →  Conversation   (a `system` column goes in front)
    prompt+response | prompt+completion strings                  →  TextPair
    input_ids (+ labels, completion_mask, assistant_masks)       →  Tokenized

A column or speaker nobody knows is an error, never a row that trains nothing; `columns.py` says what becomes of each column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from sft_plugins.masking.examples.columns import (
    Reading,
    check_beside_conversation,
    check_beside_text,
    system_of,
    template_kwargs,
)
from sft_plugins.masking.examples.content import content_text
from sft_plugins.masking.examples.flags import check_row_flags
from sft_plugins.masking.examples.messages import Message, check_thoughts, message_texts, read_messages
from sft_plugins.masking.examples.tokenized import Tokenized, parse_tokenized
from sft_plugins.masking.examples.tools import read_tools
from sft_plugins.masking.examples.values import check_text, is_blank, read_json, schema_error, too_deep

ACCEPTED_COLUMNS = (
    "`prompt`+`response` or `prompt`+`completion` (strings or message lists), `messages`, `conversations`, "
    "`instruction`(+`input`)+`output`, `query`+`response`, or `input_ids` with `labels`, `completion_mask` or "
    "`assistant_masks`"
)
# Question and answer as two texts of a chat; `input` and `history` may stand beside them.
_CHAT_PAIRS = (("instruction", "output"), ("input", "output"), ("query", "response"))
_FORMS = (
    ("input_ids",), ("messages",), ("conversations",), ("prompt", "response"), ("prompt", "completion"), *_CHAT_PAIRS,
)  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template; `trainable[i]` says whether message i is to carry loss."""

    messages: list[Message]
    trainable: list[bool]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    # What was made of this conversation and will be asked for again, by its class (`coverage/planting.py`).
    kept: dict[type, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def texts(self) -> list[str]:
        """Every free text of each message (`message_texts`), joined by NUL."""
        return ["\0".join(message_texts(message)) for message in self.messages]

    @cached_property
    def contents(self) -> list[tuple[str, bytes]]:
        """Role and content of each message, white space at its ends aside, in UTF-8."""
        return [(message["role"], content_text(message.get("content")).strip().encode()) for message in self.messages]


@dataclass(frozen=True)
class TextPair:
    """Two texts trained as they stand, without a chat template."""

    prompt: str
    response: str


Example: TypeAlias = Conversation | TextPair | Tokenized


def parse_example(row: Mapping[str, Any], reading: Reading) -> Example:
    """Recognise the form of `row`.

    Raises:
        MaskingError: `bad_schema` for unknown columns, roles and types; `length_mismatch` for masks of another length.
    """
    if not isinstance(row, Mapping):
        raise schema_error(f"a row must be a mapping of columns, got {type(row).__name__}.", f"Use {ACCEPTED_COLUMNS}.")
    if reading.ignore_columns:
        row = {key: value for key, value in row.items() if key not in reading.ignore_columns}
    try:
        return _parse(row, reading)
    except RecursionError as error:
        raise too_deep("the row") from error


def known_form(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that say which form `row` has; empty where none does."""
    present = {key for key, value in row.items() if value is not None}
    return next((form for form in _FORMS if present.issuperset(form)), ())


def _parse(row: Mapping[str, Any], reading: Reading) -> Example:
    check_row_flags(row)
    match known_form(row):
        case ("input_ids",):
            return parse_tokenized(row)
        case (column,):
            return _conversation(row, (column,), _messages(row[column], column, reading), reading)
        case ("prompt", answer):
            return _prompt_and_answer(row, answer, reading)
        case (asked, answer):
            return _pair_of_a_chat(row, asked, answer, reading)
    present = any(value is not None for value in row.values())
    found = ", ".join(f"`{key}`" for key in sorted(map(str, row))) or "none"
    missing = f" All of {found} are None." if row and not present else ""
    raise schema_error(f"no known row form: found columns {found}.{missing}", f"Use {ACCEPTED_COLUMNS}.")


def _conversation(
    row: Mapping[str, Any],
    form: tuple[str, ...],
    raw: list[Message],
    reading: Reading,
    *,
    first_trainable: int = 0,
) -> Conversation:
    """The conversation of `raw`, read from the columns `form`; messages before `first_trainable` are a prompt."""
    if not raw:
        raise schema_error(
            "the conversation has no messages.", "Remove the row or give it at least one user and assistant."
        )
    said = read_messages(raw[:first_trainable], reading.roles) if first_trainable else []
    before = len(said)
    said += read_messages(raw[first_trainable:], reading.roles, first=first_trainable)
    messages = [one.message for one in said]
    trainable = [
        index >= before and one.message["role"] == "assistant" and one.train is not False
        for index, one in enumerate(said)
    ]
    if system := system_of(row):
        first = messages[0]
        if first["role"] not in ("system", "developer"):
            messages, trainable = [{"role": "system", "content": system}, *messages], [False, *trainable]
        elif first.get("content") != system:
            raise schema_error(
                "the row has a `system` column and another system message.",
                "Remove one of them; neither is left out silently.",
            )
    conversation = Conversation(messages, trainable, tools=read_tools(row), template_kwargs=template_kwargs(row))
    check_beside_conversation(row, form, conversation.texts, reading)
    for index, message in enumerate(messages):
        if len(message) != 2 or "content" not in message:  # more than a role and a content
            check_thoughts(message, f"message {index} ({message['role']})", reading.names)
    for index, text in enumerate(conversation.texts):
        if not text.isascii():
            check_text(text, f"message {index} ({messages[index]['role']})")
    return conversation


def _messages(value: Any, column: str, reading: Reading) -> list[Message]:
    if isinstance(value, str):
        value = read_json(value, f"`{column}`")
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
    if not reading.ignore_columns:
        return list(value)
    return [{key: item for key, item in message.items() if key not in reading.ignore_columns} for message in value]


def _prompt_and_answer(row: Mapping[str, Any], answer: str, reading: Reading) -> Example:
    prompt, response = row["prompt"], row[answer]
    if isinstance(prompt, str) and isinstance(response, str):
        return _text_pair(row, ("prompt", answer), prompt, response)
    if isinstance(prompt, str) or isinstance(response, str):
        raise schema_error(
            f"`prompt` is {type(prompt).__name__} and `{answer}` is {type(response).__name__}.",
            "Give two strings, or two lists of messages.",
        )
    before, after = _messages(prompt, "prompt", reading), _messages(response, answer, reading)
    return _conversation(row, ("prompt", answer), before + after, reading, first_trainable=len(before))


def _pair_of_a_chat(row: Mapping[str, Any], question: str, answer: str, reading: Reading) -> Example:
    """With a chat template, what a chat will ask later; without one, the prompt of the Stanford Alpaca recipe."""
    form = ("query", "response", "history") if question == "query" else ("instruction", "input", "output", "history")
    asked, extra = _string(row, form[0]), _string(row, "input") if "input" in form else ""
    if not asked and not extra:
        raise schema_error(f"the row's `{form[0]}` is blank, and nothing else asks.", "Remove the row.")
    if not asked:
        asked, extra = extra, ""
    history, output = _history(row.get("history")), _string(row, answer)
    if reading.has_chat_template:
        said = [*history, ("user", "\n\n".join(text for text in (asked, extra) if text)), ("assistant", output)]
        return _conversation(row, form, [{"role": role, "content": text} for role, text in said], reading)
    if history:
        raise schema_error(
            "the row has a `history`, and without a chat template no form for it.", "Set a chat template."
        )
    parts = {"Instruction": asked, "Input": extra}
    with_input = ", paired with an input that provides further context" if extra else ""
    intro = (
        f"Below is an instruction that describes a task{with_input}. "
        "Write a response that appropriately completes the request.\n\n"
    )
    told = "".join(f"### {name}:\n{text}\n\n" for name, text in parts.items() if text)
    return _text_pair(row, form, f"{intro}{told}### Response:", output)


def _history(value: Any) -> list[tuple[str, str]]:
    """Earlier rounds, as LLaMA-Factory and ms-swift write them: `[[question, answer], …]`. Their answers are trained too."""
    if isinstance(value, str) and not is_blank(value):
        value = read_json(value, "`history`")
    if is_blank(value):
        return []
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in value
    ):
        raise schema_error("`history` must be a list of [question, answer].", "Give the conversation as `messages`.")
    return [said for question, answer in value for said in (("user", question), ("assistant", answer))]


def _text_pair(row: Mapping[str, Any], form: tuple[str, ...], prompt: str, response: str) -> TextPair:
    check_beside_text(row, form, [prompt, response])
    return TextPair(prompt, response)


def _string(row: Mapping[str, Any], key: str) -> str:
    """The text of a column, "" where it is blank."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise schema_error(f"`{key}` must be a string, got {type(value).__name__}.", "Convert it, or drop the row.")
    return value if value.strip() else ""
