"""The parts of a conversation."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A named row. `special` marks rows holding `{special}`, where a special token of the tokenizer at hand goes.

    `options`: those of a masker that the row is read with.
    """

    name: str
    row: dict[str, Any]
    special: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def for_tokenizer(self, special_token: str) -> dict[str, Any]:
        """A fresh copy of the row, `{special}` replaced by `special_token`."""
        row = copy.deepcopy(self.row)
        if self.special:
            for message in row["messages"]:
                message["content"] = message["content"].replace("{special}", special_token)
        return row


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any, **extra: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **extra}


def assistant(content: Any, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **extra}


def tool(content: Any, name: str = "get_weather", call: str = "call00001") -> dict[str, Any]:
    return {"role": "tool", "content": content, "name": name, "tool_call_id": call}


def call(arguments: Any, name: str = "get_weather", identifier: str = "call00001") -> dict[str, Any]:
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "days": {"type": "integer", "description": "How many days ahead"},
            },
            "required": ["city"],
        },
    },
}


TIME_TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time of day.",
        "parameters": {"type": "object", "properties": {}},
    },
}
