"""Conversations that break masks: a hand-written set, and strategies that make more, with chat templates to match.

`CONVERSATIONS` are rows as users have them (`messages`, with `tools` or `chat_template_kwargs` where needed). `PLAIN`
names those that every chat template takes; a template that is not exact even on them is of no use for training.
"""

from __future__ import annotations

from testkit.conversations.building import WEATHER_TOOL, Conversation, assistant, call, parts, system, tool, user
from testkit.conversations.cases import BY_NAME, CONVERSATIONS, PLAIN
from testkit.conversations.random_rows import conversations, texts
from testkit.conversations.random_templates import TemplateKnobs, templates

__all__ = [
    "BY_NAME",
    "CONVERSATIONS",
    "PLAIN",
    "WEATHER_TOOL",
    "Conversation",
    "TemplateKnobs",
    "assistant",
    "call",
    "conversations",
    "parts",
    "system",
    "templates",
    "texts",
    "tool",
    "user",
]
