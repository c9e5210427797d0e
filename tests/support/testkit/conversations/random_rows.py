"""Random conversations."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from testkit.conversations.building import assistant, system, user
from testkit.conversations.ugly import FAMILY

_WORDS = [
    *["yes", "Hello", "assistant", "user", "the", "42", "3.14", "naïve", "日本", "é", "e\u0301", FAMILY] * 2,
    *["<", ">", "|", "im_end", "{{", "%}", "\\n", "'", '"', ".", "1,000", "a.b", "ß", "مرحبا"] * 2,
    *["<think>", "</think>"],
]


_GAPS = ["", " ", "  ", "\n", "\n\n", "\t", " \n", "\u00a0", "\u200d"]


@st.composite
def texts(draw: st.DrawFn, *, min_words: int = 0, max_words: int = 6) -> str:
    """Words and whitespace in any order: short, ugly, shrinks to plain words."""
    count = draw(st.integers(min_words, max_words))
    text = draw(st.sampled_from(_GAPS))
    for _ in range(count):
        text += draw(st.sampled_from(_WORDS)) + draw(st.sampled_from(_GAPS))
    return text


@st.composite
def conversations(draw: st.DrawFn, *, max_turns: int = 3, reasoning: bool = True) -> dict[str, Any]:
    """A row of `messages`: maybe a system message, turns of one user and one or two assistants, some flags."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append(system(draw(texts())))
    for _ in range(draw(st.integers(1, max_turns))):
        messages.append(user(draw(texts(min_words=1))))
        for _ in range(draw(st.sampled_from([1] * 7 + [2]))):
            extra: dict[str, Any] = {}
            if reasoning and draw(st.sampled_from([False, False, True])):
                extra["reasoning_content"] = draw(texts(min_words=1))
            flag = draw(st.sampled_from([None] * 8 + [0, 1, True, False]))
            if isinstance(flag, bool):
                extra["train"] = flag
            elif flag is not None:
                extra["weight"] = flag
            messages.append(assistant(draw(texts(min_words=draw(st.sampled_from([1] * 7 + [0])))), **extra))
    if draw(st.sampled_from([False, False, False, True])):
        messages.append(user(draw(texts())))
    if draw(st.sampled_from([False] * 9 + [True])):  # somebody writes a special token
        messages[draw(st.integers(0, len(messages) - 1))]["content"] += "</s> "
    return {"messages": messages}
