"""Modes of a template: the generation prompts that its switches give, and the one that a rendered turn goes on from."""

from __future__ import annotations

import re
from typing import Any

from testkit.mask_oracle.content import missing_pieces
from testkit.mask_oracle.own_text import CLOSED, OPEN, REASONING, own_text, rewritten_text, thoughts
from testkit.mask_oracle.template import render

SWITCHES = ("enable_thinking", "thinking")


def modes(tokenizer: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Values of the template's switches to try, none of them first; the user's own decide alone."""
    template = tokenizer.get_chat_template(None, row.get("tools") or None)
    names = [name for name in SWITCHES if re.search(rf"\b{name}\b", template)]
    if any(name in (row.get("chat_template_kwargs") or {}) for name in names):
        return [{}]
    return [{}, *({name: value} for name in names for value in (False, True))]


def in_mode(row: dict[str, Any], mode: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chat_template_kwargs": {**(row.get("chat_template_kwargs") or {}), **mode}} if mode else row


def chosen_mode(tokenizer: Any, row: dict[str, Any], k: int) -> tuple[dict[str, Any], str | None]:
    """The mode that turn `k` belongs to, and its own text where its rendering goes on from no prompt of the template."""
    messages, message = row["messages"], row["messages"][k]
    found: list[tuple[bool, int, dict[str, Any]]] = []
    own: list[tuple[bool, dict[str, Any], str]] = []
    rewritten: list[tuple[int, dict[str, Any], str]] = []
    for mode in modes(tokenizer, row):
        switched = in_mode(row, mode)
        try:
            prompt = render(tokenizer, messages[:k], switched, generation=True)
            full = render(tokenizer, messages[: k + 1], switched, generation=False)
        except Exception:
            if not mode:
                raise
            continue
        wrong_kind = bool(CLOSED.search(prompt)) if thoughts(message) else bool(OPEN.search(prompt))
        text = own_text(prompt, full, message)
        if text is not None:
            own.append((wrong_kind, mode, text))
        if not full.startswith(prompt):
            told = None if wrong_kind else rewritten_text(tokenizer, switched, k, prompt, full)
            if told is not None:
                history = render(tokenizer, messages[:k], switched, generation=False)
                rewritten.append((len(history) - len(prompt), mode, told))
            continue
        if any(what in REASONING for what in missing_pieces(message, full[len(prompt) :])):
            continue
        try:
            header = len(prompt) - len(render(tokenizer, messages[:k], switched, generation=False))
        except Exception:
            header = 0
        found.append((wrong_kind, -header, mode))
    if found:
        return min(found, key=lambda one: one[:2])[2], None
    if own:
        return min(own, key=lambda one: one[0])[1:]
    return min(rewritten, key=lambda one: one[0])[1:] if rewritten else ({}, None)
