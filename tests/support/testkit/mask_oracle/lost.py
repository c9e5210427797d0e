"""What the template leaves out of the prompt before a turn: a row is changed in one place, and must then render otherwise."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from testkit.mask_oracle.content import text_of
from testkit.mask_oracle.template import render


def variants(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Readings of the row that the contract leaves open; a row is exact if it is exact under one of them.

    Keys holding None are dropped everywhere (columnar typing fills them in). A None content beside tool calls may reach
    the template as None, as "" or not at all; tool arguments may be a mapping or JSON text, text a string or one part.
    """
    has_none = any(m.get("content") is None for m in row["messages"])
    has_calls = any(m.get("tool_calls") for m in row["messages"])
    roles = ("system", "developer", "user", "assistant", "tool")
    texts: list[Any] = [None, (), roles, ("user",), roles[2:]]  # None: as it is; else the roles that speak in parts
    for parts, content, arguments in itertools.product(
        texts, ["keep", "drop", "empty"][: 3 if has_none else 1], ["keep", "mapping", "text"][: 3 if has_calls else 1]
    ):
        new = {k: _without_none(v) if k in ("tools", "chat_template_kwargs") else v for k, v in row.items()}
        new["messages"] = [_variant(m, content, arguments, parts) for m in row["messages"]]
        yield new


def _variant(message: dict[str, Any], content: str, arguments: str, parts: Any) -> dict[str, Any]:
    new = _without_none(copy.deepcopy(message))
    if message.get("content") is None:
        empty = [{"type": "text", "text": ""}] if message["role"] in (parts or ()) else ""
        kept = {"content": None} if "content" in message else {}
        new.update({"keep": kept, "drop": {}, "empty": {"content": empty}}[content])
    elif parts is not None:
        text = text_of(message["content"])
        new["content"] = [{"type": "text", "text": text}] if message["role"] in parts else text
    for item in new.get("tool_calls") or []:
        function = item.get("function") or item
        given = function.get("arguments")
        if arguments == "mapping" and isinstance(given, str):
            function["arguments"] = json.loads(given or "{}")
        if arguments == "text" and isinstance(given, dict):
            function["arguments"] = json.dumps(given, ensure_ascii=False)
    return new


def printed_values(messages: list[dict[str, Any]], text: str) -> list[str]:
    """Values that the template printed as Python or JSON prints them, where it should have rendered what is in them."""
    found = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(p in text for p in (str(content), json.dumps(content))):
            found.append("content printed as a list")
        for item in message.get("tool_calls") or []:
            given = (item.get("function") or item).get("arguments")
            if isinstance(given, dict) and given and str(given) in text and str(given) != json.dumps(given):
                found.append("arguments printed as Python prints them")
            if isinstance(given, str) and (('"' in given and json.dumps(given) in text) or "{" + given + "}" in text):
                found.append("arguments encoded twice")
            if given == "" and not re.search(r"\{\s*\}", text):
                found.append("arguments left blank")
    return found


MARK = "Zoraclemarkq"


def lost_before(tokenizer: Any, row: dict[str, Any], k: int) -> list[str]:
    """What is in no prompt of turn `k`: altered, it does not alter the prompt. Earlier reasoning may be left out."""

    def altered(change: Any) -> bool:
        new = copy.deepcopy(row)
        if change(new) is False:
            return True
        return MARK in render(tokenizer, new["messages"][:k], new, generation=True)

    def content(j: int) -> Any:
        def change(new: dict[str, Any]) -> Any:
            said = new["messages"][j].get("content")
            if not text_of(said).strip():
                return False
            if isinstance(said, str):
                new["messages"][j]["content"] = said.rstrip() + MARK
            else:
                said[-1]["text"] = said[-1]["text"].rstrip() + MARK
            return True

        return change

    def call_name(j: int, n: int) -> Any:
        def change(new: dict[str, Any]) -> None:
            item = new["messages"][j]["tool_calls"][n]
            (item.get("function") or item)["name"] += MARK

        return change

    def description(n: int) -> Any:
        def change(new: dict[str, Any]) -> Any:
            function = new["tools"][n].get("function") or new["tools"][n]
            if not function.get("description"):
                return False
            function["description"] += MARK
            return True

        return change

    changes = [(f"message {j}", content(j)) for j in range(k)]
    changes += [
        (f"call {n} of message {j}", call_name(j, n))
        for j in range(k)
        for n in range(len(row["messages"][j].get("tool_calls") or []))
    ]
    changes += [(f"tool {n}", description(n)) for n in range(len(row.get("tools") or []))]
    try:
        return [f"{what} is in no prompt" for what, change in changes if not altered(change)]
    except Exception as error:  # a template that refuses the altered row has looked at what was altered
        return [] if MARK in str(error) else [f"cannot be shown: {error}"]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]  # a list has no holes for columnar storage to fill
    return value
