"""What a message says, in one form: text as a string, whatever the data has for it.

    "yes"   [{"type": "text", "text": "ye"}, {"type": "output_text", "text": "s"}]      →  content "yes"
    [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]           →  content "yes", reasoning "hm"

Whether a template is given the string or a part is decided by what it renders (`coverage/forms.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sft_plugins.masking.examples.flags import train_flag
from sft_plugins.masking.examples.values import schema_error

_TEXT_PARTS = ("text", "input_text", "output_text")


class Content(NamedTuple):
    """The text of a message, the reasoning that stood among its parts, and whether the parts say it is trained."""

    text: str | None
    reasoning: str | None = None
    train: bool | None = None


def read_content(content: Any, where: str, *, role: str) -> Content:
    """`content` of a message as `Content`.

    Raises:
        MaskingError: `bad_schema` for parts that are no text, and for text that only partly carries loss.
    """
    if content is None or isinstance(content, str):
        return Content(content)
    if not isinstance(content, (list, tuple)):
        remedy = "Content must be a string."
        if role == "tool":
            remedy = "Give the result as text, JSON text for example, in the form that the model will see."
        raise schema_error(f"{where} has content of type {type(content).__name__}.", remedy)
    return _read_parts(content, where, role)


def content_text(content: Any) -> str:
    """The text of a message's content: a string, or the `text` parts of a list joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(part.get("text") or "" for part in content)
    return ""


def _read_parts(parts: Sequence[Any], where: str, role: str) -> Content:
    texts: list[str] = []
    thoughts: list[str] = []
    flags: set[bool | None] = set()
    for part in parts:
        kind = _kind(part)
        text = part.get("thinking" if kind == "thinking" else "text") if isinstance(part, Mapping) else None
        if kind not in (*_TEXT_PARTS, "thinking") or not isinstance(text, str):
            result = " Give the result as JSON text." if role == "tool" and not isinstance(part, Mapping) else ""
            raise schema_error(
                f"{where} has a part of type {kind!r}, and only text is supported.",
                f"Known parts: {', '.join(_TEXT_PARTS)} with `text`, thinking with `thinking`.{result} Vision and audio "
                "models need their own collator; calls and results belong into `tool_calls` and messages of role `tool`.",
            )
        if kind == "thinking" and any(texts):
            raise schema_error(
                f"{where} has a thinking part behind its text.", "A template renders reasoning first: put it in front."
            )
        (thoughts if kind == "thinking" else texts).append(text)
        flags.add(train_flag(part, where, role=role))
    if len(flags - {None}) > 1 or (False in flags and None in flags):
        raise schema_error(
            f"{where} has parts that are to carry loss and parts that are not.",
            "A turn carries loss or does not: make the parts messages of their own, or give all the same flag.",
        )
    flag = flags.pop() if len(flags) == 1 else (True if flags else None)
    return Content("".join(texts), "".join(thoughts) or None, flag)


def _kind(part: Any) -> str:
    return str(part.get("type") or "text") if isinstance(part, Mapping) else type(part).__name__
