"""The quick encoder makes rows sooner or not at all, never other rows; where it may not be used, the report says why."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from sft_plugins.masking import PromptMasker, mask_dataset
from sft_plugins.masking.encoding import fast
from testkit.tokenizers import build_tokenizer

ROWS = [
    {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i * 7}."}]}
    for i in range(600)
]


class Planted:
    """The tokenizer itself behind the quick encoder's call, with a fault for texts that `wrong` names."""

    def __init__(self, tokenizer: Any, wrong: Callable[[str], bool]) -> None:
        self.backend, self.wrong, self.calls = tokenizer.backend_tokenizer, wrong, 0
        self.seen: set[str] = set()

    def encode_batch_flat(self, texts: list[str], add_special_tokens: bool) -> tuple[bytes, bytes]:
        self.calls += 1
        self.seen.update(texts)
        ids = [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
        ids = [one[::-1] if self.wrong(text) else one for one, text in zip(ids, texts, strict=True)]
        flat = np.array([token for one in ids for token in one], np.uint32)
        return flat.tobytes(), np.cumsum([0, *map(len, ids)], dtype=np.uint64).tobytes()


class _NotWrittenOut:
    """A backend, but for its definition."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        assert name != "to_str"
        return getattr(self.backend, name)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The quick encoder counts as installed, and as worth building for the first texts; its trial is a short one."""
    monkeypatch.setattr(fast, "_COMPARED", 2000)
    monkeypatch.setattr(fast, "_CHARACTERS_PER_TOKEN", 0)
    monkeypatch.setattr(fast, "_WORTH_TRYING", 0)
    monkeypatch.setattr(fast, "installed", lambda: True)
    return monkeypatch


def masked(tokenizer: Any) -> tuple[list[Any], list[str]]:
    made = mask_dataset(Dataset.from_list(ROWS), PromptMasker(tokenizer))
    return made.dataset.to_list(), made.report.notes  # type: ignore[union-attr]


def plainly(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> tuple[list[Any], list[str]]:
    with monkeypatch.context() as patch:
        patch.setattr(fast, "installed", lambda: False)
        return masked(tokenizer)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda text: "日本" in text, "it gives other ids for"),  # a probe
        (lambda text: "Question 3?" in text, "it gives other ids for"),  # one of the first texts
        (lambda text: any(f"Question {i}?" in text for i in range(300, 600)), "it gave other ids for"),  # later, in use
    ],
    ids=["probe", "first", "later"],
)
def test_an_encoder_that_gives_other_ids_is_found_told_and_makes_no_row(
    wrong: Callable[[str], bool], told: str, at_once: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer("qwen")
    rows, notes = plainly(at_once, tokenizer)
    planted = Planted(tokenizer, wrong)
    at_once.setattr(fast, "build", lambda definition: fast.QuickEncoder(planted))
    got, now = masked(tokenizer)
    assert got == rows
    (note,) = [note for note in now if note not in notes]
    assert "fastokens" in note
    assert told in note
    assert any(map(wrong, planted.seen))


class Panic(BaseException):
    """As a library in Rust raises it through pyo3: no `Exception`."""


@pytest.mark.parametrize("error", [ValueError, Panic])
@pytest.mark.parametrize("at", ["日本", "Question 3?", "Question 450?"], ids=["probe", "first", "later"])
def test_an_encoder_that_fails_is_told_and_the_tokenizer_makes_all_rows(
    at: str, error: type[BaseException], at_once: pytest.MonkeyPatch
) -> None:
    def fail(text: str) -> bool:
        if at in text:
            raise error("index out of bounds")
        return False

    tokenizer = build_tokenizer("qwen")
    rows, notes = plainly(at_once, tokenizer)
    at_once.setattr(fast, "build", lambda definition: fast.QuickEncoder(Planted(tokenizer, fail)))
    got, now = masked(tokenizer)
    assert got == rows
    (note,) = [note for note in now if note not in notes]
    assert ("it failed" if "450" in at else "it does not take this tokenizer") + " (index out of bounds)" in note


def test_ctrl_c_is_no_fault_of_the_encoder(at_once: pytest.MonkeyPatch) -> None:
    def interrupt(definition: str) -> Any:
        raise KeyboardInterrupt

    at_once.setattr(fast, "build", interrupt)
    with pytest.raises(KeyboardInterrupt):
        PromptMasker(build_tokenizer("qwen")).encode_batch(ROWS)


def test_rows_without_a_fault_come_from_the_quick_encoder(at_once: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("qwen")
    planted = Planted(tokenizer, lambda text: False)
    at_once.setattr(fast, "build", lambda definition: fast.QuickEncoder(planted))
    assert masked(tokenizer) == plainly(at_once, tokenizer)
    told = "".join(planted.seen)
    assert all(f"Answer {i * 7}.<" in told for i in range(384, 600))  # the second batch: behind the trial


def test_ids_are_the_tokenizers_own_until_the_quick_encoder_was_held_to_enough(at_once: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("qwen")
    planted = Planted(tokenizer, lambda text: False)
    at_once.setattr(fast, "build", lambda definition: fast.QuickEncoder(planted))
    encoder = fast.BatchEncoder(tokenizer.backend_tokenizer, len(tokenizer), [])
    batches = [[f"{'x' * 50} {number} {k}" for k in range(20)] for number in range(4)]  # 1,000 characters and some each
    own, asked = encoder.own, []
    at_once.setattr(encoder, "own", lambda texts: asked.append([*texts]) or own(texts))
    encoder(batches[0])
    assert not planted.calls  # nobody said that texts are coming
    encoder.expect(batches[1])
    for batch in batches:
        assert encoder(batch) == own(batch)
    assert [batch in asked for batch in batches] == [True, True, False, False]
    assert planted.seen >= {text for batch in batches for text in batch}


def test_an_encoder_that_differed_on_trial_is_not_tried_again(at_once: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("qwen")
    planted = Planted(tokenizer, lambda text: text == "text 3")
    at_once.setattr(fast, "build", lambda definition: fast.QuickEncoder(planted))
    encoder = fast.BatchEncoder(tokenizer.backend_tokenizer, len(tokenizer), [])
    batches = [[f"text {number}" for number in range(start, start + 400)] for start in (0, 400, 800)]
    encoder.expect(batches[0])
    assert [encoder(batch) for batch in batches] == [encoder.own(batch) for batch in batches]
    assert encoder.against == "it gives other ids for 'text 3'"
    assert planted.seen.isdisjoint(batches[1] + batches[2])


def test_a_definition_that_was_written_out_for_the_cache_is_not_written_out_again(
    at_once: pytest.MonkeyPatch,
) -> None:
    tokenizer = build_tokenizer("qwen")
    built: list[str] = []
    at_once.setattr(fast, "build", lambda definition: built.append(definition) or fast._build(definition))
    masker = PromptMasker(tokenizer)
    definition = masker._text.definition()
    at_once.setattr(masker._text.batch, "_backend", _NotWrittenOut(tokenizer.backend_tokenizer))
    masker.encode_batch(ROWS[:100])
    assert [one.endswith(definition) for one in built] == [True]


@pytest.mark.parametrize("when", ["before", "in use"])
def test_a_quick_encoder_of_before_a_token_was_added_makes_no_row(when: str, at_once: pytest.MonkeyPatch) -> None:
    tokenizer, old = build_tokenizer("qwen"), build_tokenizer("qwen")
    at_once.setattr(fast, "build", lambda definition: fast.QuickEncoder(Planted(old, lambda text: False)))
    masker = PromptMasker(tokenizer)
    masker.fingerprint()
    if when == "in use":
        assert all(one.rows for one in masker.encode_batch(ROWS))
        assert masker._text.batch is not None
        assert masker._text.batch._quick is not None
    tokenizer.add_tokens([f"Answer {7 * i}." for i in range(0, 600, 2)])
    made = [one.rows[0].input_ids for one in masker.encode_batch(ROWS)]
    assert made == [row["input_ids"] for row in plainly(at_once, tokenizer)[0]]
    assert len(made[300]) < len(made[301]) - 3


def test_that_the_encoder_failed_is_not_forgotten_when_a_token_is_added(at_once: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("qwen")
    at_once.setattr(fast, "build", lambda definition: fast.QuickEncoder(Planted(tokenizer, lambda text: True)))
    masker = PromptMasker(tokenizer)
    masker.encode_batch(ROWS)
    told = [note for note in masker.notes if "fastokens" in note]
    tokenizer.add_tokens("Answer 7.")
    at_once.setattr(fast, "build", lambda definition: pytest.fail("built"))
    masker.encode_batch(ROWS)
    assert len(told) == 1
    assert told[0] in masker.notes


def test_a_definition_with_padding_switched_on_is_none_to_build_of(at_once: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("qwen")
    built: list[str] = []
    at_once.setattr(fast, "build", lambda definition: built.append(definition) or fast._build(definition))
    masker = PromptMasker(tokenizer)
    tokenizer(["a b c", "d"], padding="max_length", truncation=True, max_length=2)
    masker.fingerprint()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    masker.encode_batch(ROWS[:100])
    (definition,) = built
    assert '"truncation":null,"padding":null' in definition


def test_a_stream_goes_on_with_the_tokenizer_where_the_encoder_fails(
    at_once: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "sft_plugins")
    tokenizer = build_tokenizer("qwen")
    planted = Planted(tokenizer, lambda text: any(f"Question {i}?" in text for i in range(300, 600)))
    at_once.setattr(fast, "build", lambda definition: fast.QuickEncoder(planted))
    masker = PromptMasker(tokenizer)
    made = [
        row.input_ids
        for start in (0, 300)
        for one in masker.encode_batch(ROWS[start : start + 300])
        for row in one.rows
    ]
    assert made == [row["input_ids"] for row in plainly(at_once, tokenizer)[0]]
    assert "not used any more" in caplog.text
    used = planted.calls
    assert any("Question 250?" in text for text in planted.seen)
    masker.encode_batch(ROWS)
    assert planted.calls == used


def test_of_texts_that_are_encoded_side_by_side_one_in_64_is_held_to_the_tokenizer(
    at_once: pytest.MonkeyPatch,
) -> None:
    tokenizer = build_tokenizer("qwen")
    planted = Planted(tokenizer, lambda text: False)
    at_once.setattr(fast, "build", lambda definition: fast.QuickEncoder(planted))
    encoder = fast.BatchEncoder(tokenizer.backend_tokenizer, len(tokenizer), [])
    texts = [f"text {number}" for number in range(160)]
    at_once.setattr(encoder, "_to_compare", 1)
    encoder.expect(texts)
    encoder(texts)  # on trial
    own, held = encoder.own, []
    at_once.setattr(encoder, "own", lambda texts: held.extend(texts) or own(texts))
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(encoder, [texts] * 40))
    assert made == [own(texts)] * 40
    assert len(held) == 40 * 160 / 64


def test_an_encoder_that_does_not_take_the_tokenizer_is_told(at_once: pytest.MonkeyPatch) -> None:
    def build(definition: str) -> Any:
        raise ValueError("unsupported pre-tokenizer type: Metaspace")

    tokenizer = build_tokenizer("qwen")
    at_once.setattr(fast, "build", build)
    rows, notes = masked(tokenizer)
    assert rows == plainly(at_once, tokenizer)[0]
    assert any("does not take this tokenizer (unsupported pre-tokenizer" in note for note in notes)


def test_without_the_extra_nothing_is_built(at_once: pytest.MonkeyPatch) -> None:
    at_once.setattr(fast, "build", lambda definition: pytest.fail("built"))
    assert len(plainly(at_once, build_tokenizer("qwen"))[0]) == len(ROWS)


def test_with_padding_left_switched_on_nothing_is_built(at_once: pytest.MonkeyPatch) -> None:
    """Then only the tokenizer's public call is exact."""
    at_once.setattr(fast, "build", lambda definition: pytest.fail("built"))
    tokenizer = build_tokenizer("qwen")
    masker = PromptMasker(tokenizer)
    tokenizer(["a b c", "d"], padding="max_length", max_length=8)
    assert all(outcome.rows for outcome in masker.encode_batch(ROWS[:100]))


@pytest.mark.parametrize("kind", ["qwen", "bytelevel", "llama3", "sp-nodummy", "sp-bpe"])
def test_fastokens_itself_makes_the_same_rows_or_is_not_used(kind: str, at_once: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastokens")
    tokenizer = build_tokenizer(kind, eos="</s>")
    rows, notes = masked(tokenizer)
    expected, plain = plainly(at_once, tokenizer)
    assert rows == expected
    assert (notes == plain) == (kind != "sp-bpe")  # whose Metaspace fastokens 0.3 does not take
