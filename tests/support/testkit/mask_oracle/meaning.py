"""What a row means under options that say how it is to be read."""

from __future__ import annotations

import copy
from typing import Any

from testkit.mask_oracle.content import text_of
from testkit.mask_oracle.own_text import REASONING, thoughts
from testkit.mask_oracle.questions import refusals

_NAMES = {"human": "user", "gpt": "assistant", "observation": "tool", "ipython": "tool", "function": "tool"}


def meant(
    tokenizer: Any,
    row: dict[str, Any],
    *,
    stop_ids: set[int],
    roles: dict[str, str] | None = None,
    reasoning: str = "raise",
) -> dict[str, Any]:
    """The row that `row` means: its speakers under the templates' names, and, where the template does not render the
    reasoning of a turn, that put in front of the answers (`inline`) or left out (`drop`)."""
    row = copy.deepcopy(row)
    for message in row["messages"]:
        name = message["role"]
        message["role"] = (roles or {}).get(name) or _NAMES.get(name, name)
    if reasoning == "raise" or not refusals(tokenizer, row, stop_ids=stop_ids).codes:
        return row
    for message in row["messages"]:
        kept = {key: value for key, value in message.items() if key not in REASONING[1:]}
        if kept == message:
            continue
        if reasoning == "inline":
            thought = thoughts({key: value for key, value in message.items() if key not in ("content", "tool_calls")})
            text = f"<think>\n{thought}\n</think>\n\n{text_of(message.get('content'))}"
            kept["content"] = [{"type": "text", "text": text}] if isinstance(message.get("content"), list) else text
        message.clear()
        message.update(kept)
    return row
