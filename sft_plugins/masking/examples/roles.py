"""Who speaks: every name that the field gives a role, and nothing by likeness.

    role: user | human        from: gpt | model | assistant        tool_call: an assistant that writes its call as JSON

A name that nobody knows is an error: a misspelt speaker would train nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft_plugins.masking.examples.values import schema_error

ROLES = ("system", "developer", "user", "assistant", "tool")
CALL = "tool_call"  # an assistant whose content is the JSON of its calls
ALLOWED_TARGETS = (*ROLES, CALL)

_NAMES = {
    **{role: role for role in ALLOWED_TARGETS},
    "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "observation": "tool", "observations": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool",
    "function_call": CALL,
}  # fmt: skip


def role_of(message: Mapping[str, Any], index: int, given: Mapping[str, str]) -> str:
    """The role of `message`, under `role` (OpenAI) or `from` (ShareGPT); `given` names come before the known ones."""
    key = "from" if message.get("from") is not None else "role"
    if key == "from" and message.get("role") not in (None, message["from"]):
        raise schema_error(
            f"message {index} has both `role`={message['role']!r} and `from`={message['from']!r}.",
            "Remove one of them.",
        )
    name = message.get(key)
    if isinstance(name, str):
        if name in given:
            return given[name]
        if name in _NAMES:
            return _NAMES[name]
        if name == "function" and key == "role":  # OpenAI's result of a call; what a speaker of that name says, differs
            return "tool"
    raise schema_error(
        f"message {index} has the unknown role {name!r} under `{key}`; known: {', '.join(_NAMES)}.",
        "Rename it, or say what it means with {roles:roles=…}: a misspelt role would train nothing.",
    )
