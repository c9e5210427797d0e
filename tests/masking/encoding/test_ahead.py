"""Rows planned while those before them are encoded are the rows that come out one after the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sft_plugins.masking import PromptMasker
from sft_plugins.masking import masker as module
from sft_plugins.masking.encoding.ahead import encoded_ahead
from testkit.conversations import TemplateKnobs
from testkit.tokenizers import build_tokenizer

EXAMPLES = [
    {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}." * i}]}
    for i in range(60)
]  # the first has an empty answer, which is refused


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_all_come_out_once_and_in_order(count: int) -> None:
    made = list(encoded_ahead(iter(range(count)), lambda plans: -plans))
    assert made == [(plans, -plans) for plans in range(count)]


def test_the_next_are_planned_while_the_tokenizer_has_the_texts_before_them() -> None:
    planned: list[int] = []
    second = threading.Event()

    def plans() -> Iterator[int]:
        for number in range(3):
            planned.append(threading.get_ident())
            if len(planned) == 2:
                second.set()
            yield number

    def encode(_: int) -> int:
        assert second.wait(60), "nothing was planned meanwhile"
        return threading.get_ident()

    encoded = [thread for _, thread in encoded_ahead(plans(), encode)]
    assert set(planned) == {threading.get_ident()}
    assert len(encoded) == 3
    assert threading.get_ident() not in encoded


@pytest.mark.parametrize("at", ["plan", "encode", "reader"])
def test_what_is_raised_is_raised_and_no_thread_stays(at: str) -> None:
    before = threading.active_count()

    def fail(who: str, number: int) -> int:
        if who == at and number == 1:
            raise MemoryError(who)
        return number

    def read() -> None:
        for number, _ in encoded_ahead((fail("plan", n) for n in range(3)), lambda number: fail("encode", number)):
            fail("reader", number)

    with pytest.raises(MemoryError, match=at):
        read()
    assert threading.active_count() == before


@pytest.mark.parametrize("padded", [False, True])
def test_outcomes_of_a_batch_are_those_of_its_rows(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With padding left switched on in the tokenizer only its public call is exact, and that one stays in one thread."""
    monkeypatch.setattr(module, "_CHARACTERS", 500)
    tokenizer = build_tokenizer("qwen")
    masker = PromptMasker(tokenizer)
    alone = [masker.encode_batch([example])[0] for example in EXAMPLES]
    threads: list[int] = []
    encode = masker._text.encode

    def watched(texts: list[str]) -> Any:
        threads.append(threading.get_ident())
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
    assert ({*threads} == {threading.get_ident()}) == padded
    assert len(threads) > 10


def test_answers_that_part_from_their_header_are_tokenised_in_the_tokenizers_thread_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their second tokenisation would else be waited for with nothing else to do."""
    template = TemplateKnobs(generation_prompt="empty_think", reasoning="always_block").jinja()
    masker = PromptMasker(build_tokenizer("bytelevel", chat_template=template, eos="</s>"))
    apart: list[str] = []
    threads: set[int] = set()
    own = masker._text.encode_continuations

    def watched(texts: list[str]) -> Any:
        threads.add(threading.get_ident())
        apart.extend(texts)
        return own(texts)

    monkeypatch.setattr(masker._text, "encode_continuations", watched)
    assert all(one.rows for one in masker.encode_batch(EXAMPLES[1:]))
    assert len(apart) == len(EXAMPLES) - 1  # guard: every answer parts from its header
    assert threads
    assert threading.get_ident() not in threads
