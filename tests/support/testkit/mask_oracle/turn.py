"""What generation is given before a turn, and what it should then produce."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from testkit.mask_oracle.content import missing_pieces
from testkit.mask_oracle.lost import lost_before, printed_values
from testkit.mask_oracle.modes import chosen_mode, in_mode
from testkit.mask_oracle.template import Turn, decode, prompt_ids, render


def turn(tokenizer: Any, row: dict[str, Any], k: int, stop_ids: set[int]) -> Turn:
    messages, message = row["messages"], row["messages"][k]
    try:
        mode, own = chosen_mode(tokenizer, row, k)
        row = in_mode(row, mode)
        prompt = render(tokenizer, messages[:k], row, generation=True)
        full = render(tokenizer, messages[: k + 1], row, generation=False)
        ids = prompt_ids(tokenizer, messages[:k], row)
    except (
        Exception
    ) as error:  # whatever a template throws: the row cannot be rendered, so nothing can be generated from it
        why = f"turn {k}: the template raises {type(error).__name__}: {error}"
        return Turn(index=k, codes=frozenset({"template_error", "bad_schema"}), why=why)
    if own is not None:
        full = prompt + own
    lost = missing_pieces(message, full[len(prompt) :] if full.startswith(prompt) else full)
    lost += printed_values(messages[: k + 1], full) + lost_before(tokenizer, row, k)
    if not full.startswith(prompt):
        codes = {"render_mismatch", *({"content_lost"} if lost else ())}
        why = f"turn {k}: rendered turn does not continue the generation prompt …{prompt[-40:]!r}"
        return Turn(index=k, codes=frozenset(codes), why=why)
    rest = full[len(prompt) :]
    special = [*map(str, tokenizer.all_special_tokens), *map(str, tokenizer.added_tokens_decoder.values())]
    glue = re.compile("(?:" + "|".join([r"\s", *map(re.escape, sorted(special, key=len, reverse=True))]) + ")*")
    responses = []
    for stop in {str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids}:
        for match in re.finditer(re.escape(stop), rest):
            if glue.fullmatch(rest, match.end()) and not missing_pieces(message, rest[: match.end()]):
                responses.append(rest[: match.end()])
    borrowed = "" if responses or lost else next_header_stop(tokenizer, row, k, full, stop_ids)
    if borrowed:
        responses.append(rest + borrowed)
    codes = set()
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == (bos, bos):
        codes.add("double_bos")
    if lost:
        codes.add("content_lost")
    if not responses and (not lost or not any(str(tokenizer.convert_ids_to_tokens(i)) in rest for i in stop_ids)):
        codes.add("missing_stop")
    if codes:
        if not any(continuation(tokenizer, ids, option) == rest for option in tokenisations(tokenizer, rest)):
            codes.add("boundary")  # a masker may notice this first
        return Turn(index=k, codes=frozenset(codes), why=f"turn {k}: {sorted(codes)} {lost} in {rest[-80:]!r}")
    ordered = tuple(sorted(set(responses), key=len))
    return Turn(
        index=k, prompt=prompt, prompt_ids=ids, responses=ordered, borrowed=bool(borrowed),
        mode=tuple(mode.items()), continued=own is not None,
    )  # fmt: skip


def next_header_stop(tokenizer: Any, row: dict[str, Any], k: int, full: str, stop_ids: set[int]) -> str:
    """The stop token that opens whatever the template renders after message `k`, or ""."""
    messages = row["messages"]
    # The header is looked up in a conversation of its own too: a later message may rewrite the turn's rendering.
    probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Zanswerq"}]
    following = messages[k + 1 : k + 2] or [
        {"role": "tool" if messages[k].get("tool_calls") else "user", "content": "z"}
    ]
    try:
        longer = render(tokenizer, messages[: k + 1] + following, row, generation=False)
        if not longer.startswith(full):
            full = render(tokenizer, probe, row, generation=False).rpartition("Zanswerq")[2]
            longer = render(tokenizer, probe + following, row, generation=False).rpartition("Zanswerq")[2]
    except Exception:  # nothing can follow: nothing to borrow
        return ""
    if not longer.startswith(full):
        return ""
    stops = [str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids]
    return next((stop for stop in stops if longer.startswith(stop, len(full))), "")


def continuation(tokenizer: Any, before: Sequence[int], after: Sequence[int]) -> str | None:
    """The text that `after` adds behind `before`; None where decoding it changes the text before."""
    base, joined = decode(tokenizer, before), decode(tokenizer, [*before, *after])
    return joined[len(base) :] if joined.startswith(base) else None


def tokenisations(tokenizer: Any, text: str) -> list[list[int]]:
    """Obvious ways to tokenise a text that goes on where another ends, without special tokens added.

    The text by itself, and the text behind an anchor (an added token, a newline, a colon) whose ids are cut off again,
    which keeps tokenizers that write `▁` before the first word from doing so.
    """
    added = str(tokenizer.convert_ids_to_tokens(next(iter(tokenizer.added_tokens_decoder))))
    found = [list(tokenizer(text, add_special_tokens=False)["input_ids"])]
    for anchor in (added, "\n", ":"):
        front = list(tokenizer(anchor, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(anchor + text, add_special_tokens=False)["input_ids"])
        if whole[: len(front)] == front:
            found.append(whole[len(front) :])
    return found


def tokenizable(tokenizer: Any, expected: Turn) -> bool:
    """Whether an obvious tokenisation of the response joins the prompt without changing a character."""
    return any(
        continuation(tokenizer, expected.prompt_ids, ids) == text
        for text in expected.responses
        for ids in tokenisations(tokenizer, text)
    )
