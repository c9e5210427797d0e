"""What a message holds: its text, the pieces that must show, and what would forge a special token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any


def text_of(content: Any) -> str:
    """The text of a message's content: a string, text parts, or None."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def pieces(message: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """(what, spellings) of everything in the data that the supervised text must hold in one of its spellings."""
    found: list[tuple[str, tuple[str, ...]]] = []
    content = text_of(message.get("content"))
    inline = re.fullmatch(r"\s*(?:<think>)?(.*?)</think>(.*)", content, flags=re.DOTALL)
    if inline:  # templates re-render the tags with their own whitespace, or put the opening one into the prompt
        found += [("inline reasoning", (inline[1].strip(),)), ("content", (inline[2].strip(),))]
    else:
        found.append(("content", (content.strip(),)))
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(key), str):
            found.append((key, (message[key].strip(),)))
    for item in message.get("tool_calls") or []:
        function = item.get("function") or item
        found.append(("tool name", (function["name"],)))
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                found.append(("tool arguments", (arguments,)))
                continue
        for path, value in _leaves(arguments or {}):
            found += [("tool argument name", (str(step),)) for step in path if isinstance(step, str)]
            ascii_, utf8 = json.dumps(value), json.dumps(value, ensure_ascii=False)
            spellings = [str(value), ascii_, utf8, json.dumps(ascii_)[1:-1]]
            if isinstance(value, str):
                spellings.append(utf8[1:-1])
            found.append(("tool argument", tuple(spellings)))
    return [(what, spellings) for what, spellings in found if spellings[0]]


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterable[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index))
    else:
        yield path, value


def missing_pieces(message: dict[str, Any], text: str) -> list[str]:
    return [what for what, spellings in pieces(message) if not any(s in text for s in spellings)]


def is_empty(message: dict[str, Any]) -> bool:
    return not pieces(message)


def forged_tokens(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    """Special tokens spelled out in the data: they would become real ones."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    strings = [s for message in row["messages"] for s in _strings({k: v for k, v in message.items() if k != "role"})]
    strings += list(_strings(row.get("tools") or []))
    return sorted({token for token in special for s in strings if token in s})


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *_strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def trainable(messages: Sequence[dict[str, Any]], train_on: str = "all") -> list[int]:
    """Indices of the assistant messages that carry loss: not those with weight 0 or train False."""
    indices = [
        i for i, m in enumerate(messages)
        if m["role"] == "assistant" and m.get("weight") in (None, 1, 1.0) and m.get("train") in (None, True)
    ]  # fmt: skip
    indices = indices[-1:] if train_on == "last" else indices
    # An assistant that opens the conversation is context: nothing prompts it.
    return indices[1:] if indices[:1] == [0] and len(indices) > 1 else indices
