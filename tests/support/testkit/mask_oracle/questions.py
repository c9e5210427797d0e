"""The two questions: which refusals would be justified, and what is wrong with rows that were made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from testkit.mask_oracle.content import forged_tokens, is_empty, trainable
from testkit.mask_oracle.lost import variants
from testkit.mask_oracle.modes import in_mode, modes
from testkit.mask_oracle.template import IGNORE, Refusals, Turn, decode, render
from testkit.mask_oracle.turn import continuation, tokenizable, turn


def refusals(tokenizer: Any, row: dict[str, Any], *, stop_ids: set[int], train_on: str = "all") -> Refusals:
    """Which codes justify refusing `row`, and whether a row may be made of it at all."""
    found = []
    for variant in variants(row):
        found.append(_refusals(tokenizer, variant, stop_ids, train_on))
        if not found[-1].codes:
            return Refusals()
    return Refusals(
        codes=frozenset().union(*(one.codes for one in found)),
        must=all(one.must for one in found),
        why=tuple(dict.fromkeys(why for one in found for why in one.why)),
    )


def _refusals(tokenizer: Any, row: dict[str, Any], stop_ids: set[int], train_on: str) -> Refusals:
    codes: set[str] = set()
    why: list[str] = []
    must = False
    forged = forged_tokens(tokenizer, row)
    if forged:
        codes.add("special_token_in_content")
        why.append(f"special tokens in the data: {forged}")
        must = True
    turns = trainable(row["messages"], train_on)
    if not turns:
        return Refusals(
            codes=frozenset({*codes, "no_supervised_tokens", "bad_schema"}), must=True, why=("no turn to train",)
        )
    for k in turns:
        message = row["messages"][k]
        if message.get("content") is None and not message.get("tool_calls"):
            codes.add("bad_schema")
            why.append(f"turn {k}: neither content nor tool calls")
        if is_empty(message):  # a supervised stop token or a refusal, both are fine
            codes.add("empty_response")
            why.append(f"turn {k}: empty")
        if k == 0:  # nothing precedes it: some templates render that, transformers' own entry point does not
            codes.add("no_prompt")
            why.append("turn 0 has no prompt")
        expected = turn(tokenizer, row, k, stop_ids)
        if expected.codes:
            codes |= expected.codes
            why.append(expected.why)
            must = True
            continue
        if not tokenizable(tokenizer, expected):
            codes |= {"boundary"}
            why.append(f"turn {k}: the tokenizer does not give {expected.responses[0][-60:]!r} back")
    return Refusals(codes=frozenset(codes), must=must, why=tuple(why))


def violations(
    tokenizer: Any, row: dict[str, Any], examples: Sequence[Any], *, stop_ids: set[int], train_on: str = "all"
) -> list[str]:
    """What is wrong with the rows made of `row`; empty when they hold the four invariants."""
    found = []
    for variant in variants(row):
        found.append(_violations(tokenizer, variant, examples, stop_ids, train_on))
        if not found[-1]:
            break
    return min(found, key=len)


def _violations(
    tokenizer: Any, row: dict[str, Any], examples: Sequence[Any], stop_ids: set[int], train_on: str
) -> list[str]:
    faults = []
    forged = forged_tokens(tokenizer, row)
    if forged:
        faults.append(f"nothing else: special tokens {forged} in the data were let through")
    wanted = [turn(tokenizer, row, k, stop_ids) for k in trainable(row["messages"], train_on)]
    faults += [f"must be refused: {one.why}" for one in wanted if one.codes]
    seen = {one.index: 0 for one in wanted}
    for number, example in enumerate(examples):
        ids, labels = [int(i) for i in example.input_ids], [int(i) for i in example.labels]
        faults += [f"row {number}: {fault}" for fault in structure(tokenizer, ids, labels)]
        if len(ids) == len(labels):
            faults += [f"row {number}: {f}" for f in _check_row(tokenizer, row, ids, labels, wanted, seen, stop_ids)]
    for index, count in seen.items():
        if count != 1:
            faults.append(f"nothing else: turn {index} is supervised {count} times")
    return faults


def structure(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[str]:
    """Invariant 4 as far as ids and labels alone show it."""
    faults = []
    if len(ids) != len(labels):
        return [f"nothing else: {len(ids)} ids, {len(labels)} labels"]
    if not ids:
        return ["nothing else: empty row"]
    if labels[0] != IGNORE:
        faults.append("nothing else: the first label is supervised")
    wrong = [i for i, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (a, IGNORE)]
    if wrong:
        faults.append(f"nothing else: labels differ from ids at {wrong[:5]}")
    if all(label == IGNORE for label in labels):
        faults.append("nothing else: no token is supervised")
    if any(not 0 <= i < len(tokenizer) for i in ids):
        faults.append("nothing else: id out of range")
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        faults.append("parity: two BOS tokens")
    return faults


def runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal supervised spans: labels -100 -100 7 8 -100 9 -> (2, 4), (5, 6)."""
    edges = [i for i in range(len(labels) + 1)
             if (i < len(labels) and labels[i] != IGNORE) != (i > 0 and labels[i - 1] != IGNORE)]  # fmt: skip
    return list(zip(edges[::2], edges[1::2], strict=True))


def _check_row(
    tokenizer: Any, row: dict[str, Any], ids: list[int], labels: list[int], wanted: list[Turn],
    seen: dict[int, int], stop_ids: set[int],
) -> list[str]:  # fmt: skip
    faults = []
    end = 0
    for start, stop in runs(labels):
        at = start
        while at < stop:  # two turns may touch, where a template puts nothing between them
            here = [one for one in wanted if one.responses and list(one.prompt_ids) == ids[:at]]
            if not here and at > start:
                faults.append(f"stop: supervised on behind the stop token: {decode(tokenizer, ids[at:stop])!r}")
                break
            if not here:
                faults.append(
                    f"parity: supervised ids {at}:{stop} ({decode(tokenizer, ids[at:stop])[:60]!r}) do not start where "
                    f"generation of a trainable turn would; before: …{decode(tokenizer, ids[:at])[-60:]!r}"
                )
                break
            expected = here[0]
            ends = [
                e for e in range(at + 1, stop + 1)
                if ids[e - 1] in stop_ids and continuation(tokenizer, ids[:at], ids[at:e]) in expected.responses
            ]  # fmt: skip
            if not ends:
                if ids[stop - 1] not in stop_ids:
                    faults.append(f"stop: turn {expected.index} ends on {decode(tokenizer, ids[stop - 1 : stop])!r}")
                faults.append(
                    f"coverage: turn {expected.index} is {continuation(tokenizer, ids[:at], ids[at:stop])!r}, "
                    f"expected {expected.responses}"
                )
                break
            seen[expected.index] += 1
            at = ends[-1]
        end = stop
    tail = continuation(tokenizer, ids[:end], ids[end:])
    if end and end < len(ids) and not _belongs(tokenizer, row, decode(tokenizer, ids)):
        faults.append(f"nothing else: text behind the last turn is not the template's: {tail!r}")
    return faults


def _belongs(tokenizer: Any, row: dict[str, Any], text: str) -> bool:
    """Whether `text` opens a rendering of the conversation (decoding may drop the very first space)."""
    messages = row["messages"]
    for k, mode in itertools.product(range(len(messages), 0, -1), modes(tokenizer, row)):
        for generation in (False, True):
            try:
                full = render(tokenizer, messages[:k], in_mode(row, mode), generation=generation)
            except Exception:  # a prefix that cannot be rendered proves nothing
                continue
            if full.startswith((text, text.lstrip(" "))) or full.replace(" ", "").startswith(text.replace(" ", "")):
                return True
    return False
