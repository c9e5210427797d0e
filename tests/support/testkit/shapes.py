"""Conversations of one shape and other texts, shown to one `TracedTemplate` one after another.

Each is rendered by the traces that were made of those before it, and held to transformers' own environment.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

from transformers.utils import chat_template_utils

from sft_plugins.masking.rendering.traced import TracedTemplate

# Texts that answer alike what templates ask of texts, and otherwise: blank, tags, case, digits, lines, layouts, quotes.
TEXTS = [
    "Hello", "Hello there", "", " ", " a \n", "<think>a</think>b", "</think>", "ABC", "abc", "7", "0", "-1.5", "a,b,,c",
    "a\nb\n", "{0}", "%s", "user", "None", "True", "é\u0301 ß ﬁ", 'say "x" \\ \t', "<b>&amp;</b>", "Zhidden0neddihZ",
]  # fmt: skip
NUMBERS = [0, 1, 7, -1.5, 1e300]
FOR, END = "{% for m in messages %}", "{% endfor %}"


def oracle(
    source: str, messages: list[dict[str, Any]], variables: dict[str, Any], generation_prompt: bool
) -> str | None:
    """What transformers' own environment writes; None where the template complains."""
    template = chat_template_utils._compile_jinja_template(source)
    shown = copy.deepcopy({**variables, "messages": messages, "add_generation_prompt": generation_prompt})
    try:
        return template.render(shown)
    except Exception:
        return None


def call(number: Any, text: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": text or "f", "arguments": {"n": number, "t": text}}}


def rows(count: int, start: int = 0) -> Iterable[list[dict[str, Any]]]:
    """Conversations of one shape."""
    texts, numbers = itertools.cycle([*TEXTS[start:], *TEXTS[:start]]), itertools.cycle(NUMBERS)
    for text in itertools.islice(texts, count):
        other, number = next(texts), next(numbers)
        yield [
            {"role": "user", "content": text, "n": int(number)},
            {"role": "assistant", "content": other, "thinking": text, "tool_calls": [call(int(number), text)]},
        ]


def held(source: str, count: int = 5, **variables: Any) -> int:
    """How many of so many conversations were rendered by a trace, each being held to the oracle."""
    template = TracedTemplate(source)
    for messages in [*rows(2), *rows(count, len(source) % len(TEXTS))]:
        expected = oracle(source, messages, variables, False)
        if expected and " at 0x" in expected:
            continue  # an address in memory, which no two renderings share
        look = template.look(messages, variables)
        assert look.render(2, False, otherwise=lambda *_, text=expected: text) == expected, (source, messages)
    assert template.usable, f"{source}: a trace gave another text than the template"
    return template.traces.used
