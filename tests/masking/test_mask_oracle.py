"""The oracle itself: it accepts the reference, sees every mutation, and refuses what cannot be exact."""

from __future__ import annotations

from typing import Any

import pytest

from testkit import mask_oracle
from testkit.conversations import BY_NAME, CONVERSATIONS
from testkit.tokenizers import (
    build_tokenizer,
    special_for,
    stop_ids_for_template,
    template_names,
    tokenizer_for_template,
)

ROW = BY_NAME["many_turns"].row


def chatml() -> Any:
    return build_tokenizer("qwen")


def merged(tokenizer: Any) -> mask_oracle.Row:
    """The reference rows of ROW as one row of all turns: under ChatML each prompt holds the turns before it."""
    rows = mask_oracle.reference_rows(tokenizer, ROW, stop_ids={tokenizer.eos_token_id})
    whole = rows[-1]
    for row in rows[:-1]:
        start = row.labels.index(row.input_ids[row.labels.count(mask_oracle.IGNORE)])
        whole.labels[start : len(row.labels)] = row.labels[start:]
    return whole


def check(tokenizer: Any, *rows: mask_oracle.Row) -> list[str]:
    return mask_oracle.violations(tokenizer, ROW, rows, stop_ids={tokenizer.eos_token_id})


def test_the_oracle_accepts_the_reference() -> None:
    tokenizer = chatml()
    assert check(tokenizer, *mask_oracle.reference_rows(tokenizer, ROW, stop_ids={tokenizer.eos_token_id})) == []
    assert check(tokenizer, merged(tokenizer)) == []


def _shift_right(t: Any, r: mask_oracle.Row) -> None:
    mask = [label != mask_oracle.IGNORE for label in r.labels]
    r.labels[:] = [i if m else mask_oracle.IGNORE for i, m in zip(r.input_ids, [False, *mask[:-1]], strict=True)]


def _unmask_prompt_token(t: Any, r: mask_oracle.Row) -> None:
    at = mask_oracle.runs(r.labels)[0][0] - 1
    r.labels[at] = r.input_ids[at]


def _drop_stop(t: Any, r: mask_oracle.Row) -> None:
    r.labels[mask_oracle.runs(r.labels)[0][1] - 1] = mask_oracle.IGNORE


def _train_newline(t: Any, r: mask_oracle.Row) -> None:
    at = mask_oracle.runs(r.labels)[0][1]
    r.labels[at] = r.input_ids[at]


def _skip_first_token(t: Any, r: mask_oracle.Row) -> None:
    r.labels[mask_oracle.runs(r.labels)[0][0]] = mask_oracle.IGNORE


def _forget_turn(t: Any, r: mask_oracle.Row) -> None:
    start, end = mask_oracle.runs(r.labels)[1]
    r.labels[start:end] = [mask_oracle.IGNORE] * (end - start)


def _double_bos(t: Any, r: mask_oracle.Row) -> None:
    r.input_ids[:0], r.labels[:0] = [t.pad_token_id], [mask_oracle.IGNORE]


def _wrong_label(t: Any, r: mask_oracle.Row) -> None:
    r.labels[mask_oracle.runs(r.labels)[0][0]] += 1


def _train_all(t: Any, r: mask_oracle.Row) -> None:
    r.labels[:] = r.input_ids


def _extra_tail(t: Any, r: mask_oracle.Row) -> None:
    r.input_ids += [t.eos_token_id]
    r.labels += [mask_oracle.IGNORE]


def _other_token_in_response(t: Any, r: mask_oracle.Row) -> None:
    at = mask_oracle.runs(r.labels)[0][0]
    r.input_ids[at] = r.labels[at] = t("X")["input_ids"][0]


@pytest.mark.parametrize(
    ("mutate", "word"),
    [
        (_shift_right, "parity"),
        (_unmask_prompt_token, "parity"),
        (_drop_stop, "stop"),
        (_train_newline, "stop"),
        (_skip_first_token, "parity"),
        (_forget_turn, "supervised 0 times"),
        (_double_bos, "parity"),
        (_wrong_label, "labels differ"),
        (_train_all, "first label"),
        (_extra_tail, "behind the last turn"),
        (_other_token_in_response, "coverage"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_the_oracle_sees_every_mutation(mutate: Any, word: str) -> None:
    tokenizer = chatml()
    row = merged(tokenizer)
    mutate(tokenizer, row)
    assert any(word in fault for fault in check(tokenizer, row)), check(tokenizer, row)


def test_the_oracle_sees_a_turn_supervised_twice() -> None:
    tokenizer = chatml()
    assert any("2 times" in fault for fault in check(tokenizer, merged(tokenizer), merged(tokenizer)))


def test_the_oracle_refuses_rows_that_cannot_be_exact() -> None:
    """A template whose generation prompt opens a block that the rendering lacks, masked as if that were no matter."""
    tokenizer = chatml()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    stop = {tokenizer.eos_token_id}
    assert mask_oracle.refusals(tokenizer, ROW, stop_ids=stop).must
    codes = mask_oracle.refusals(tokenizer, ROW, stop_ids=stop).codes
    assert "render_mismatch" in codes
    assert codes <= {
        "render_mismatch",
        "template_error",
        "bad_schema",
    }  # what the row's other forms give: parts for text
    assert check(tokenizer, merged(chatml()))


def test_reference_is_exact_wherever_the_oracle_says_it_can_be() -> None:
    """The oracle's two halves agree: what it calls refusable raises in the reference, everything else is exact."""
    exact = 0
    for name in template_names()[::5]:
        tokenizer, stop = tokenizer_for_template(name), stop_ids_for_template(name)
        for conversation in CONVERSATIONS:
            row = conversation.for_tokenizer(special_for(name))
            allowed = mask_oracle.refusals(tokenizer, row, stop_ids=stop)
            if not allowed.codes:
                rows = mask_oracle.reference_rows(tokenizer, row, stop_ids=stop)
                assert mask_oracle.violations(tokenizer, row, rows, stop_ids=stop) == [], (name, conversation.name)
                exact += 1
    assert exact >= 50
