"""Rows planned while those before them are encoded are the rows that come out one after the other."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_plugins.masking import PromptMasker
from sft_plugins.masking.encoding.ahead import ROWS, in_turn
from testkit.tokenizers import build_tokenizer

EXAMPLES = [
    {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}." * i}]}
    for i in range(4 * ROWS)
]  # the first has an empty answer, which is refused


@given(st.integers(0, 5 * ROWS), st.booleans())
def test_all_come_out_once_and_in_order(count: int, ahead: bool) -> None:
    made = list(in_turn(list(range(count)), tuple, lambda plans: [-plan for plan in plans], ahead=ahead))
    assert [plan for plans, _ in made for plan in plans] == list(range(count))
    assert all(list(ids) == [-plan for plan in plans] for plans, ids in made)


def test_the_next_are_planned_while_the_tokenizer_has_the_texts_before_them() -> None:
    planned: list[int] = []
    second = threading.Event()

    def plan(examples: list[int]) -> list[int]:
        planned.append(threading.get_ident())
        if len(planned) == 2:
            second.set()
        return examples

    def encode(plans: list[int]) -> int:
        assert second.wait(60), "nothing was planned meanwhile"
        return threading.get_ident()

    encoded = [thread for _, thread in in_turn(list(range(3 * ROWS)), plan, encode, ahead=True)]
    assert set(planned) == {threading.get_ident()}
    assert len(encoded) == 3
    assert threading.get_ident() not in encoded


@pytest.mark.parametrize("at", ["plan", "encode", "reader"])
def test_what_is_raised_is_raised_and_no_thread_stays(at: str) -> None:
    before = threading.active_count()

    def fail(who: str, examples: list[int]) -> list[int]:
        if who == at and ROWS in examples:
            raise MemoryError(who)
        return examples

    def read() -> None:
        for _ in in_turn(
            list(range(3 * ROWS)), lambda some: fail("plan", some), lambda some: fail("encode", some), ahead=True
        ):
            fail("reader", [ROWS])

    with pytest.raises(MemoryError, match=at):
        read()
    assert threading.active_count() == before


@pytest.mark.parametrize("padded", [False, True])
def test_outcomes_of_a_batch_are_those_of_its_rows(padded: bool) -> None:
    """With padding left switched on in the tokenizer only its public call is exact, and that one stays in one thread."""
    tokenizer = build_tokenizer("qwen")
    masker = PromptMasker(tokenizer)
    alone = [masker.encode_batch([example])[0] for example in EXAMPLES]
    threads: set[int] = set()
    encode = masker._text.encode

    def watched(texts: list[str]) -> Any:
        threads.add(threading.get_ident())
        return encode(texts)

    masker._text.encode = watched  # type: ignore[method-assign]
    if padded:
        tokenizer(["a b c", "d"], padding="max_length", truncation=True, max_length=2)
    together = masker.encode_batch(EXAMPLES)
    assert [one.rows for one in together] == [one.rows for one in alone]
    assert [[error.code for error in one.errors] for one in together] == [
        ["empty_response"],
        *[[]] * (len(EXAMPLES) - 1),
    ]
    assert (threads <= {threading.get_ident()}) == padded
