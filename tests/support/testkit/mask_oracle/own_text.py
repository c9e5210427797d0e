"""The text of a turn that the template does not render after its prompt."""

from __future__ import annotations

import copy
import re
from typing import Any

from testkit.mask_oracle.content import missing_pieces, pieces, text_of
from testkit.mask_oracle.lost import MARK
from testkit.mask_oracle.template import render

OPEN, CLOSED = re.compile(r"<think>\s*$"), re.compile(r"</think>\s*$")


def thoughts(message: dict[str, Any]) -> str:
    """The reasoning of a message, inline or under a key, or ""."""
    return "".join(spellings[0] for what, spellings in pieces(message) if what in REASONING)


REASONING = ("inline reasoning", "reasoning_content", "reasoning", "thinking")


def rewritten_text(tokenizer: Any, row: dict[str, Any], k: int, prompt: str, full: str) -> str | None:
    """What the template writes for turn `k` where it renders the history before it otherwise than the prompt does.

    It stands behind the last text of another message: after the header of the generation prompt, or, where an answer or a
    result went before and the template goes on without one, from the turn's own text on.
    """
    messages = row["messages"]
    others = []
    for j in range(k):
        new = copy.deepcopy(messages[: k + 1])
        if not _marked(new[j]):
            return None
        others.append(render(tokenizer, new, row, generation=False))
    new = copy.deepcopy(messages[: k + 1])
    _marked(new[k], front=True)
    with_mark = render(tokenizer, new, row, generation=False)
    start = with_mark.find(MARK)
    if start < 0 or with_mark.replace(MARK, "", 1) != full:
        return None
    earlier = 0
    for text in others:
        behind = len(text) - text.rfind(MARK) - len(MARK) if MARK in text else None
        # Texts of others that the template puts behind the turn's own are no history.
        if behind is not None and text.replace(MARK, "", 1) == full and len(full) - behind <= start:
            earlier = max(earlier, len(full) - behind)
    between = full[earlier:start]
    history = render(tokenizer, messages[:k], row, generation=False)
    header = prompt[len(history) :] if prompt.startswith(history) else ""
    text = None
    if header and header in between:
        text = full[earlier + between.rindex(header) + len(header) :]
    elif messages[k - 1]["role"] in ("assistant", "tool") and messages[k].get("tool_calls"):
        text = call_behind(tokenizer, row, k, full, history)
    elif messages[k - 1]["role"] in ("assistant", "tool") and (
        not between.strip() or (full.startswith(history) and not full[len(history) : start].strip())
    ):
        text = full[start:]
    if text is None or any(what in REASONING for what in missing_pieces(messages[k], text)):
        return None
    return text


def call_behind(tokenizer: Any, row: dict[str, Any], k: int, full: str, history: str) -> str | None:
    """The call at `k` as the template writes it behind `history`, if it writes it so behind a question as well."""
    messages = row["messages"]
    question = [j for j in range(k) if messages[j]["role"] == "user"][-1:]
    if not question or not full.startswith(history):
        return None
    asked = messages[: question[0] + 1]
    prompt = render(tokenizer, asked, row, generation=True)
    alone = render(tokenizer, [*asked, messages[k]], row, generation=False)
    if not alone.startswith(prompt) or not alone[len(prompt) :].strip():
        return None
    called, behind = alone[len(prompt) :], full[len(history) :]
    return behind if behind.startswith(called) or called.startswith(behind) else None


def _marked(message: dict[str, Any], *, front: bool = False) -> bool:
    """Puts a mark into the message: behind its text or its call's name, or in front of what it says first."""

    def mark(text: str) -> str:
        bare = text.lstrip() if front else text.rstrip()
        return text[: len(text) - len(bare)] + MARK + bare if front else bare + MARK + text[len(bare) :]

    keys = [key for key in ("reasoning_content", "reasoning", "thinking") if message.get(key)]
    calls = message.get("tool_calls") or []
    said = message.get("content")
    if front and keys:
        message[keys[0]] = mark(message[keys[0]])
    elif text_of(said).strip():
        if isinstance(said, str):
            message["content"] = mark(said)
        else:
            at = 0 if front else -1
            said[at]["text"] = mark(said[at]["text"])
    elif calls:
        function = calls[-1].get("function") or calls[-1]
        function["name"] = mark(function["name"])
    else:
        return False
    return True


def own_text(prompt: str, full: str, message: dict[str, Any]) -> str | None:
    """What generation has to emit after `prompt` where the template does not render it there; None where nothing may.

    A prompt that opens a thought is followed by the message's reasoning, one that closes it by its answer alone.
    """
    same = 0
    while same < min(len(prompt), len(full)) and prompt[same] == full[same]:
        same += 1
    for tag in re.finditer(r"</?think>", prompt):  # a tag that the two part in is the prompt's, whole
        if tag.start() < same < tag.end():
            same = tag.start()
    rest = full[same:]
    if re.sub(r"</?think>|\s", "", prompt[same:]):
        return None
    thought = thoughts(message)
    if CLOSED.search(prompt) and not thought and prompt[same:]:
        return rest
    content = text_of(message.get("content"))
    inline = re.fullmatch(r"\s*(?:<think>)?(.*?)</think>(.*)", content, flags=re.DOTALL)
    if not thought or CLOSED.search(prompt):
        return None
    answer = (inline[2] if inline else content).strip()
    before, found, behind = rest.partition(answer) if answer else ("", "", rest.lstrip())
    if before.strip():
        return None
    if OPEN.search(prompt):
        space = prompt[len(prompt.rstrip()) :]
        if inline and not any(isinstance(message.get(key), str) for key in REASONING[1:]):
            gap = inline[2][: len(inline[2]) - len(inline[2].lstrip())]
            return inline[1].lstrip() + "</think>" + gap + found + behind
        return thought + space + "</think>" + 2 * space + found + behind
    if inline and not prompt[same:]:
        return content.lstrip() + behind if content.lstrip().startswith("<think>") else None
    return None
