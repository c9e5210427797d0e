"""What becomes of every column beside a row's own form: read, refused by name, or, where nothing is known of it, reported.

system, system_prompt, functions, documents, enable_thinking, history      read: the field knows what they mean
context, persona, passages, …, and every variable of the chat template     refused: they belong to the prompt
prompt, instruction, response, … beside messages                           refused, unless the conversation says the same
id, source, …                                                              not read; `MaskReport.unread_columns`
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_plugins.masking.examples.flags import AMBIGUOUS_FLAGS, FLAGS, PREFERENCES, TOKEN_WEIGHTS, VERDICTS
from sft_plugins.masking.examples.values import ignoring, is_blank, leaves, read_json, schema_error

SYSTEM = ("system", "system_prompt", "system_message")
# Switches of chat templates that people give a column each; `documents` is an argument of `apply_chat_template`.
SWITCHES = ("documents", "enable_thinking", "reasoning_effort", "preserve_thinking")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
TOKENISED = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask", "seq_lengths")
# Other forms: what they say must be in the conversation already.
_QUESTIONS = ("prompt", "instruction", "input", "query", "question", "problem")
_ANSWERS = ("response", "completion", "output")
_CONVERSATIONS = ("messages", "conversations", "conversation")
# They belong to a prompt, and trainers differ on where.
_PROMPT = (
    "context", "contexts", "passage", "passages", "knowledge", "persona", "background", "chat_history",
    "dialogue_history", "few_shot", "prefix", "suffix", "developer", "history",
)  # fmt: skip
_READ = frozenset({
    *_CONVERSATIONS, *_QUESTIONS, *_ANSWERS, *SYSTEM, *SWITCHES, "tools", "functions", "chat_template_kwargs", *TOKENISED,
    *MEDIA, *_PROMPT, *VERDICTS, *PREFERENCES, *FLAGS, *AMBIGUOUS_FLAGS, *TOKEN_WEIGHTS,
})  # fmt: skip
_SWITCHED = frozenset({"chat_template_kwargs", *SWITCHES})
_SAID = (*_QUESTIONS, *_ANSWERS, *_CONVERSATIONS)
# Arguments of `apply_chat_template` that are no switches of a template.
_NO_SWITCHES = (
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)  # fmt: skip
_SPELT_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "0", "1", "")
_YES_OR_NO = re.compile(r"(enable_|use_|with_|preserve_|keep_|clear_)?(think|thinking|reasoning)")
# What a template is always given, or calls; no column means them.
_NO_COLUMNS = ("messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now", "documents")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows are read.

    Attributes:
        has_chat_template: Alpaca's fields become a chat, or without one the text of its recipe.
        roles: names of speakers → roles, before the known names.
        ignore_columns: columns of rows, and keys of messages, that are not looked at.
        variables: names that the chat template reads.
        names: names that the chat template could look up in a message.
    """

    has_chat_template: bool = True
    roles: Mapping[str, str] = field(default_factory=dict)
    ignore_columns: frozenset[str] = frozenset()
    variables: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()


def unread_columns(names: Iterable[str], reading: Reading) -> list[str]:
    """Those of a data set's columns of which nothing is known, so that they have no effect."""
    known = {*_READ, *reading.variables, *reading.ignore_columns}
    return sorted(name for name in map(str, names) if name not in known)


def system_of(row: Mapping[str, Any]) -> str:
    """The system prompt that stands in a column of its own, empty where there is none."""
    found = {key: _text(row[key], key) for key in SYSTEM if key in row and not is_blank(row[key])}
    if len(set(found.values())) > 1:
        raise schema_error(
            f"the row has different system prompts in {' and '.join(f'`{key}`' for key in found)}.",
            "Remove one of them; neither is left out silently.",
        )
    return next(iter(found.values()), "")


def template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """`chat_template_kwargs`, and the switches that have a column of their own."""
    if _SWITCHED.isdisjoint(row):
        return {}
    value = row.get("chat_template_kwargs")
    if isinstance(value, str):
        value = None if is_blank(value) else read_json(value, "`chat_template_kwargs`")
    if value is not None and not isinstance(value, Mapping):
        raise schema_error(
            f"`chat_template_kwargs` must be a mapping, got {type(value).__name__}.", "Give keyword values."
        )
    made = {key: item for key, item in (value or {}).items() if item is not None}
    for key in _NO_SWITCHES:
        if key in made:
            raise schema_error(f"`chat_template_kwargs` sets {key!r}, which is no switch of a template.", "Remove it.")
    for key in SWITCHES:
        own = row.get(key)
        if is_blank(own) and not isinstance(own, bool):
            continue
        if key == "documents" and isinstance(own, str):
            own = read_json(own, "`documents`")
        if key in made and made[key] != own:
            raise schema_error(
                f"`{key}` has one value in its column and another in `chat_template_kwargs`.", "Keep one."
            )
        made[key] = own
    for key, item in made.items():
        _check_switch(key, item)
    documents = made.get("documents")
    if documents is not None and not (
        isinstance(documents, (list, tuple)) and all(isinstance(one, Mapping) for one in documents)
    ):
        raise schema_error("`documents` must be a list of mappings.", 'Write [{"title": …, "text": …}].')
    return made


def unread_switches(switches: Iterable[str], reading: Reading) -> list[str]:
    """Those of a row's switches that the chat template does not read."""
    return [f"chat_template_kwargs.{name}" for name in switches if name not in reading.variables]


def check_beside_conversation(
    row: Mapping[str, Any], form: tuple[str, ...], texts: list[str], reading: Reading
) -> None:
    """Refuse the columns beside `form` (the columns that the conversation was read from) that say more than it does.

    Raises:
        MaskingError: `bad_schema`.
    """
    _refuse_media(row)
    _refuse_other_forms(row, form, texts)
    for key, value in row.items():
        if key in form or is_blank(value):
            continue
        if key in _PROMPT or (key in reading.variables and key not in (*_NO_COLUMNS, *_READ)):
            why = "belongs to a prompt" if key in _PROMPT else "is a variable of the chat template"
            raise schema_error(
                f"the row has a column `{key}`, which {why} and is not read.",
                f"Write it into a message or into `chat_template_kwargs`, or name it in {ignoring(key)}.",
            )


def check_beside_text(row: Mapping[str, Any], form: tuple[str, ...], texts: list[str]) -> None:
    """Refuse what a prompt that is trained as it stands has no place for.

    Raises:
        MaskingError: `bad_schema`.
    """
    _refuse_media(row)
    _refuse_other_forms(row, form, texts)
    others = (*SYSTEM, *SWITCHES, "tools", "functions", "chat_template_kwargs", *_PROMPT)
    for key in others:
        if key in row and key not in form and not is_blank(row[key]):
            raise schema_error(
                f"the row has a `{key}` column, and a prompt that is trained as it stands has no place for it.",
                f"Put the text into the prompt, give the row as `messages`, or name the column in {ignoring(key)}.",
            )


def _refuse_media(row: Mapping[str, Any]) -> None:
    for name in MEDIA:
        if name in row and not is_blank(row[name]):
            raise schema_error(
                f"the row has `{name}`, and only text is supported.",
                "Fine-tune vision and audio models with their own collator, or name the column in "
                f"{ignoring(name)} to train on the text alone.",
            )


def _refuse_other_forms(row: Mapping[str, Any], form: tuple[str, ...], texts: list[str]) -> None:
    for key in _SAID:
        if key not in row or key in form or is_blank(row[key]):
            continue
        missing = [text for text in _sayings(row[key]) if not any(text in said for said in texts)]
        if missing:
            raise schema_error(
                f"the row has `{key}` beside {' and '.join(f'`{name}`' for name in form)}, and the conversation does "
                f"not hold its text {missing[0][:60]!r}.",
                f"Give one form per row, or name the column in {ignoring(key)}.",
            )


def _sayings(value: Any) -> list[str]:
    """What a column of another form says: a string, or the texts of messages."""
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, (list, tuple)):
        said = [one.get("content", one.get("value")) if isinstance(one, Mapping) else one for one in value]
        return [
            text.strip() for one in said for text in ([one] if isinstance(one, str) else leaves(one)) if text.strip()
        ]
    return [str(value)]


def _check_switch(name: str, value: Any) -> None:
    """A template asks whether a switch is true, and any text is; some ask `is false`, and 0 is not."""
    if isinstance(value, str):
        spelt = value.strip().lower() in _SPELT_BOOLEANS
    else:
        spelt = (
            isinstance(value, (int, float)) and not isinstance(value, bool) and _YES_OR_NO.fullmatch(name) is not None
        )
    if spelt:
        raise schema_error(
            f"the switch `{name}` of the chat template is {value!r}, {type(value).__name__}, and a template does not read "
            "that as true or false.",
            "Write the boolean true or false, or leave it out.",
        )


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise schema_error(f"`{key}` must be a string, got {type(value).__name__}.", "Convert it, or drop the row.")
    return value
