"""Random conversations under random chat templates and tokenizers: every row is exact, or refused for a reason."""

from __future__ import annotations

import collections
import copy
import functools
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator
from testkit import mask_oracle
from testkit.conversations import TemplateKnobs, conversations, templates, texts
from testkit.mask_oracle import IGNORE
from testkit.properties import quiet
from testkit.tokenizers import build_tokenizer

EXACT_KINDS = ("bytelevel", "qwen", "merging", "llama3", "sp-bpe", "sp-nodummy", "byt5", "sp-bpe-slow")
SPECIAL = ("<|im_start|>", "<|im_end|>", "</s>", "<|endoftext|>")
seen: collections.Counter[str] = collections.Counter()


@functools.cache
def tokenizer_of(kind: str, eos: str) -> Any:
    return build_tokenizer(kind, eos=eos, special_tokens=SPECIAL, added_tokens=("<think>", "</think>"))


def stop_ids(tokenizer: Any, knobs: TemplateKnobs) -> set[int]:
    return {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(knobs.end)}


def outcome(tokenizer: Any, row: dict[str, Any], stops: set[int], **options: Any) -> str:
    """ "exact", or the code of a justified refusal; anything else fails."""
    train_on = options.get("train_on", "all")
    allowed = mask_oracle.refusals(tokenizer, row, stop_ids=stops, train_on=train_on)
    before = copy.deepcopy(row)
    try:
        rows = PromptMasker(tokenizer, stop_token_ids=sorted(stops), **options).encode(row)
    except MaskingError as error:
        assert error.code in allowed.codes, f"{error}\nallowed: {sorted(allowed.codes)} {allowed.why}"  # noqa: PT017
        return error.code
    faults = mask_oracle.violations(tokenizer, row, rows, stop_ids=stops, train_on=train_on)
    assert not faults, "\n".join(faults)
    assert not allowed.must, allowed.why
    assert row == before
    return "exact"


@quiet(max_examples=200)
@given(
    row=conversations(),
    knobs=templates(),
    kind=st.sampled_from(EXACT_KINDS),
    eos=st.sampled_from(["<|im_end|>", "</s>"]),
    train_on=st.sampled_from(["all", "last"]),
)
def test_random_conversations_under_random_templates_are_exact_or_refused(
    row: dict[str, Any], knobs: TemplateKnobs, kind: str, eos: str, train_on: str
) -> None:
    tokenizer = tokenizer_of(kind, eos)
    tokenizer.chat_template = knobs.jinja()
    found = outcome(tokenizer, row, stop_ids(tokenizer, knobs), train_on=train_on)
    event(found)
    seen[found] += 1


def test_random_conversations_are_not_all_refused() -> None:
    """Guard: of the examples above, a good part was exact, and several codes were met."""
    if seen.total() < 200:
        pytest.skip("needs the property test to have run, in the same process")
    assert seen["exact"] >= 0.25 * seen.total(), seen
    assert len(seen) >= 5, seen


@quiet(max_examples=80)
@given(
    row=conversations(reasoning=False),
    kind=st.sampled_from(EXACT_KINDS),
    strip=st.booleans(),
    after=st.sampled_from(["\n", "", " "]),
)
def test_random_conversations_under_a_plain_template_are_exact_unless_empty(
    row: dict[str, Any], kind: str, strip: bool, after: str
) -> None:
    knobs = TemplateKnobs(strip=strip, after_end=after)
    tokenizer = tokenizer_of(kind, "<|im_end|>")
    tokenizer.chat_template = knobs.jinja()
    found = outcome(tokenizer, row, {tokenizer.eos_token_id})
    assert found in ("exact", "empty_response", "no_supervised_tokens", "special_token_in_content", "boundary"), found


@quiet(max_examples=200)
@given(prompt=texts(min_words=1), response=texts(min_words=1), kind=st.sampled_from(EXACT_KINDS))
def test_random_strings_join_without_changing_a_character(prompt: str, response: str, kind: str) -> None:
    """prompt+response rows: the ids before are those of `tokenizer(prompt)` but for an EOS behind it."""
    tokenizer = tokenizer_of(kind, "<|im_end|>")
    before = list(tokenizer(prompt)["input_ids"])
    if before[-1] == tokenizer.eos_token_id and not prompt.endswith("<|im_end|>"):
        before.pop()
    try:
        (row,) = PromptMasker(tokenizer).encode({"prompt": prompt, "response": response})
    except MaskingError as error:
        special = any(token in prompt + response for token in SPECIAL)
        allowed = {
            "boundary",
            *(["special_token_in_content"] if special else []),
            *([] if response.strip() else ["empty_response"]),
        }
        assert error.code in allowed, error  # noqa: PT017
        return
    ids, labels = list(row.input_ids), list(row.labels)
    assert mask_oracle.structure(tokenizer, ids, labels) == []
    assert ids[: len(before)] == before
    assert labels == [IGNORE] * len(before) + ids[len(before) :]
    assert mask_oracle.continuation(tokenizer, before, ids[len(before) :]) == response + tokenizer.eos_token


rows_of_ids = st.lists(st.integers(5, 60), min_size=2, max_size=12).flatmap(
    lambda ids: (
        st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1)
        .filter(any)
        .map(
            lambda mask: {
                "input_ids": ids,
                "labels": [IGNORE, *(i if m else IGNORE for i, m in zip(ids[1:], mask, strict=True))],
            }
        )
    )
)


@quiet(max_examples=150)
@given(
    rows=st.lists(rows_of_ids, min_size=1, max_size=5),
    multiple=st.sampled_from([None, 1, 4, 8]),
    pad=st.sampled_from(["eos", None, "<|pad|>"]),
)
def test_collating_changes_no_id_and_no_label(
    rows: list[dict[str, list[int]]], multiple: int | None, pad: str | None
) -> None:
    """Every row can be read back from the batch by its attention mask; everything else is padding."""
    tokenizer = _padded(pad)
    batch = StrictPromptMaskingCollator(tokenizer, pad_to_multiple_of=multiple)(rows)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    width = batch["input_ids"].shape[1]
    longest = max(len(row["input_ids"]) for row in rows)
    assert width == -(-longest // (multiple or 1)) * (multiple or 1)
    for i, row in enumerate(rows):
        real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][real].tolist() == row["input_ids"]
        assert batch["labels"][i][real].tolist() == row["labels"]
        assert (batch["labels"][i][~real] == IGNORE).all()


@functools.cache
def _padded(pad: str | None) -> Any:
    return build_tokenizer("qwen", pad=pad)
