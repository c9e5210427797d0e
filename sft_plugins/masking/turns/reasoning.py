"""Reasoning that a template does not render as the data has it: rows that go on from the prompt all the same.

    prompt      "<｜Assistant｜><think>\\n"          the template strips the reasoning of the very turn that it renders
    rendered    "<｜Assistant｜>42.<EOS>"
    row         "<｜Assistant｜><think>\\n" + "Six times seven.\\n</think>\\n\\n42.<EOS>"

What generation would emit after the prompt is the message's own text, then what the template writes behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from sft_plugins.masking.examples.content import content_text
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.messages import REASONING_KEYS, Message, reasoning_texts
from sft_plugins.masking.examples.values import leaves

Thought: TypeAlias = Literal["open", "closed", "none"]

_PAIRS = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))
_TAG = re.compile("|".join(re.escape(tag) for pair in _PAIRS for tag in pair))
_INLINE = [
    re.compile(rf"\s*(?:{re.escape(opening)})?(?P<reasoning>.*?){re.escape(closing)}(?P<answer>.*)", re.DOTALL)
    for opening, closing in _PAIRS
]
_CLOSING = dict(_PAIRS)
_SHORT = 16  # characters; longer ones are no word of a template
_OPENING, _CLOSINGS = tuple(_CLOSING), tuple(_CLOSING.values())
TAGS = (*_OPENING, *_CLOSINGS)


def thought_at_end(text: str) -> Thought:
    """Whether `text` ends on the tag that opens or closes a thought, white space aside."""
    bare = text.rstrip()
    if bare.endswith(_OPENING):
        return "open"
    return "closed" if bare.endswith(_CLOSINGS) else "none"


def inline_reasoning(message: Message) -> tuple[str, str] | None:
    """The reasoning and the answer of a message whose content begins with a thought in tags."""
    content = content_text(message.get("content"))
    if not _TAG.search(content):
        return None
    for pattern in _INLINE:
        if match := pattern.fullmatch(content):
            return match["reasoning"], match["answer"]
    return None


def reasons(message: Message) -> bool:
    """Whether the message holds reasoning, under a key or inline."""
    inline = inline_reasoning(message)
    return bool(reasoning_texts(message)) or (inline is not None and bool(inline[0].strip()))


def continuation(prompt: str, full: str, message: Message) -> str | None:
    """The response to `prompt` where the rendering `full` does not go on from it, or lacks the turn's reasoning.

    None where more parts the two than a thought that the prompt opens or closes, and white space.
    """
    same = first_difference(prompt, full)
    # A tag that the two part in ("<" opens both) is the prompt's, whole.
    same = next((tag.start() for tag in _TAG.finditer(prompt) if tag.start() < same < tag.end()), same)
    supplied, rest = prompt[same:], full[same:]
    if _TAG.sub("", supplied).strip():
        return None
    state = thought_at_end(prompt)
    if not reasons(message):
        return rest if supplied and state == "closed" else None
    if state == "closed" or (supplied and state != "open"):
        return None
    if not supplied.strip() and holds_reasoning(rest, message):
        return rest.lstrip()  # the template writes it, with other white space behind the tag
    return _own_text(prompt, rest, message, opened=state == "open")


def first_difference(one: str, other: str) -> int:
    """Where two texts part, the length of the shorter where it opens the other."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _own_text(prompt: str, rest: str, message: Message, *, opened: bool) -> str | None:
    opening = next(tag for tag in _OPENING if prompt.rstrip().endswith(tag)) if opened else "<think>"
    closing = _CLOSING[opening]
    space = prompt[len(prompt.rstrip()) :] if opened else "\n"
    inline = inline_reasoning(message)
    if reasoning_texts(message):
        answer = content_text(message.get("content")) if inline is None else inline[1]
        thought = "\n\n".join(dict.fromkeys(text.strip() for text in reasoning_texts(message)))
        own = f"{thought}{space}{closing}{space * 2}"
    else:
        assert inline is not None
        reasoning, answer = inline
        between = answer[: len(answer) - len(answer.lstrip())]
        own = (reasoning.lstrip() if space else reasoning) + closing + between
    answer = answer.strip()
    start = rest.find(answer)
    if start < 0 or rest[:start].strip():
        return None
    written = rest[start:] if answer else rest.lstrip()
    return (own if opened else opening + space + own) + written


def holds_reasoning(text: str, message: Message) -> bool:
    """Whether `text` holds all the reasoning of the message."""
    inline = inline_reasoning(message)
    parts = [*reasoning_texts(message), *([] if inline is None else [inline[0]])]
    return all(part.strip() in text for part in parts)


def may_stand_elsewhere(message: Message) -> bool:
    """Whether a text that holds the reasoning of the message may do so by its answer, its calls or a template's own words."""
    inline = inline_reasoning(message)
    answer = content_text(message.get("content")) if inline is None else inline[1]
    others = [answer, *leaves(message.get("tool_calls"))]
    parts = [part.strip() for part in (*reasoning_texts(message), *([] if inline is None else [inline[0]]))]
    return any(len(part) < _SHORT or any(part in other for other in others) for part in parts)


def inlined(conversation: Conversation, messages: Sequence[int]) -> Conversation:
    """`conversation` with the reasoning of `messages` in front of their text, in tags."""
    changed = list(conversation.messages)
    for index in messages:
        thought = "\n\n".join(dict.fromkeys(text.strip() for text in reasoning_texts(changed[index])))
        bare = _without_reasoning(changed[index])
        text = f"<think>\n{thought}\n</think>\n\n{content_text(bare.get('content'))}"
        content = [{"type": "text", "text": text}] if isinstance(bare.get("content"), list) else text
        changed[index] = {**bare, "content": content}
    return replace(conversation, messages=changed)


def dropped(conversation: Conversation, messages: Sequence[int]) -> Conversation:
    """`conversation` without the reasoning of `messages`."""
    changed = list(conversation.messages)
    for index in messages:
        changed[index] = _without_reasoning(changed[index])
    return replace(conversation, messages=changed)


def _without_reasoning(message: Message) -> Message:
    return {key: value for key, value in message.items() if key not in REASONING_KEYS}
