"""Limits of length and of ids: just inside and just outside, with what is lost counted."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, mask_dataset
from testkit.conversations import assistant, user
from testkit.tokenizers import build_tokenizer, tokenizer_for_template

ROW = {
    "messages": [
        {"role": "user", "content": "Count to four."},
        {"role": "assistant", "content": "One, two, three, four."},
        {"role": "user", "content": "And on?"},
        {"role": "assistant", "content": "Five."},
    ]
}


def encoded(**options: Any) -> Any:
    (made,) = PromptMasker(build_tokenizer("qwen"), **options).encode(ROW)
    return made


WHOLE = encoded()
LENGTH = len(WHOLE.input_ids)
TRAINED = [at for at, label in enumerate(WHOLE.labels) if label != -100]
FIRST_ANSWER_ENDS = next(at for at in TRAINED if at + 1 not in TRAINED) + 1


@pytest.mark.parametrize("overflow", ["raise", "drop", "truncate", "keep_turns"])
def test_a_row_of_exactly_the_limit_is_whole(overflow: Any) -> None:
    made = encoded(max_length=LENGTH, overflow=overflow)
    assert (list(made.input_ids), list(made.labels)) == (list(WHOLE.input_ids), list(WHOLE.labels))
    assert (made.lost_tokens, made.lost_supervised) == (0, 0)


def test_one_token_more_is_an_error() -> None:
    with pytest.raises(MaskingError, match=f"{LENGTH} tokens, max_length is {LENGTH - 1}") as caught:
        encoded(max_length=LENGTH - 1)
    assert caught.value.code == "overflow"


@pytest.mark.parametrize("limit", [LENGTH - 1, TRAINED[-1], TRAINED[-1] - 1, FIRST_ANSWER_ENDS, TRAINED[0] + 1])
def test_a_cut_row_is_the_beginning_and_says_what_it_lost(limit: int) -> None:
    made = encoded(max_length=limit, overflow="truncate")
    kept = sum(at < limit for at in TRAINED)
    assert (list(made.input_ids), list(made.labels)) == (list(WHOLE.input_ids)[:limit], list(WHOLE.labels)[:limit])
    assert (made.lost_tokens, made.lost_supervised) == (LENGTH - limit, len(TRAINED) - kept)
    assert made.role_tokens == {"trained": kept, "untrained": limit - kept}


@pytest.mark.parametrize("overflow", ["truncate", "keep_turns"])
def test_a_row_cut_before_its_first_answer_is_no_row(overflow: Any) -> None:
    with pytest.raises(MaskingError) as caught:
        encoded(max_length=TRAINED[0], overflow=overflow)
    assert caught.value.code == "no_supervised_tokens"


@pytest.mark.parametrize("limit", [FIRST_ANSWER_ENDS, FIRST_ANSWER_ENDS + 1, TRAINED[-1]])
def test_whole_turns_are_kept_to_the_last_that_fits(limit: int) -> None:
    """The first answer fits exactly, with a token to spare, and with all of the second but its stop token."""
    made = encoded(max_length=limit, overflow="keep_turns")
    assert list(made.input_ids) == list(WHOLE.input_ids)[:FIRST_ANSWER_ENDS]
    assert made.lost_supervised == sum(at >= FIRST_ANSWER_ENDS for at in TRAINED)


@pytest.mark.parametrize(
    ("overflow", "more", "modes"),
    [
        ("keep_turns", 30, {"enable_thinking=False": 1}),
        ("truncate", 30, {"enable_thinking=False": 1, "default": 1}),
        ("truncate", 1, {"enable_thinking=False": 1}),
    ],
)
def test_the_report_counts_modes_of_the_turns_that_are_left(overflow: Any, more: int, modes: dict[str, int]) -> None:
    """Of a turn that was cut away nothing is told; of one that the cut goes through, that it is trained."""
    row = {
        "messages": [user("Hi"), assistant("Yes."), user("6 * 7?"), assistant("42.", reasoning_content="Six times.")]
    }
    tokenizer = tokenizer_for_template("nemotron_3_nano")
    (whole,) = PromptMasker(tokenizer).encode(row)
    assert whole.labels[whole.turn_ends[0] + 29] != -100, "the longer cut goes through the second turn"
    asked = PromptMasker(tokenizer, max_length=whole.turn_ends[0] + more, overflow=overflow)
    assert mask_dataset(Dataset.from_list([row]), asked).report.modes == modes


def test_an_answer_that_lacks_a_token_of_room_is_not_kept() -> None:
    with pytest.raises(MaskingError) as caught:
        encoded(max_length=FIRST_ANSWER_ENDS - 1, overflow="keep_turns")
    assert caught.value.code == "no_supervised_tokens"


SIZE = len(build_tokenizer("qwen"))
STOP = build_tokenizer("qwen").convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("outside", [-1, SIZE])
def test_stop_tokens_outside_the_vocabulary_are_refused(outside: Any) -> None:
    with pytest.raises(MaskingError, match="not in the vocabulary") as caught:
        PromptMasker(build_tokenizer("qwen"), stop_token_ids=[STOP, outside])
    assert caught.value.code == "id_out_of_range"


@pytest.mark.parametrize("inside", [0, SIZE - 1])
def test_the_first_and_the_last_id_may_stop(inside: int) -> None:
    assert encoded(stop_token_ids=[STOP, inside]).input_ids == WHOLE.input_ids
