"""`MaskReport`: every figure against rows counted by hand, and the repeated prefixes against a naive prefix tree."""

from __future__ import annotations

import functools
import json
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_plugins.masking import Masked, MaskReport, PromptMasker, mask_dataset
from sft_plugins.masking.report import FIRST_ROWS, PREFIX_TOKENS, Failures, RepeatedPrefixes, repeated_prefixes
from testkit.conversations import assistant, system, user
from testkit.encoding import PRODUCT, SPLIT, STRIP
from testkit.mask_oracle import IGNORE, runs
from testkit.tokenizers import build_tokenizer, tokenizer_for_template

PLAIN = {"messages": [system("Be kind."), user("Hi"), assistant("Hello!"), user("Bye"), assistant("Bye!")]}
WIZARD = {"messages": [user("Hello"), {"role": "wizard", "content": "b"}]}
NO_ANSWER = {"messages": [user("Hello")]}
REASONED = [user("What is 6 * 7?"), assistant("42.", reasoning_content="Six times seven.")]


@functools.cache
def tokenizer_of() -> Any:
    return build_tokenizer("qwen", chat_template=STRIP)


def length(text: str) -> int:
    return len(tokenizer_of()(text, add_special_tokens=False)["input_ids"])


def masked(rows: list[dict[str, Any]], **options: Any) -> Masked:
    return mask_dataset(Dataset.from_list(rows), PromptMasker(tokenizer_of(), **options))


def test_tokens_and_shares_of_one_row_counted_by_hand() -> None:
    """`<|im_start|>system\\nBe kind.<|im_end|>\\n…`: the template's own tokens are all that is neither content nor trained."""
    made, report = masked([PLAIN])
    ids, labels = made[0]["input_ids"], made[0]["labels"]
    trained = length("Hello!<|im_end|>") + length("Bye!<|im_end|>")
    assert (report.rows_in, report.rows_out, report.dropped_rows, report.split_rows) == (1, 1, 0, 0)
    assert report.tokens == len(ids)
    assert report.supervised_tokens == trained == sum(label != IGNORE for label in labels)
    assert report.supervised_share == trained / len(ids)
    assert report.supervised_runs == len(runs(labels)) == 2
    assert report.stop_tokens == {"<|im_end|>": 2}
    expected = {"trained": trained, "system": length("Be kind."), "user": length("Hi") + length("Bye")}
    assert report.role_tokens == {**expected, "template": len(ids) - sum(expected.values())}
    assert report.longest == [(0, len(ids))]
    assert report.ok


def test_a_split_is_counted_with_the_tokens_it_repeats() -> None:
    made, report = masked([PLAIN, SPLIT])
    first, second = made[1], made[2]
    assert (report.rows_in, report.rows_out, report.split_rows) == (2, 3, 1)
    # The second row's prompt says the first exchange again, up to the end of the first row at most.
    prompt = next(i for i, label in enumerate(second["labels"]) if label != IGNORE)
    assert report.repeated_tokens == min(len(first["input_ids"]), prompt)
    assert report.supervised_runs == 4
    assert report.tokens == sum(len(row["input_ids"]) for row in made)


def test_turns_of_rows_alike_are_counted_each() -> None:
    """What is told of a row is the same for all of these, and counted once for each."""
    rows = [{"messages": messages} for messages in (REASONED, REASONED, REASONED, [*REASONED, *PRODUCT])]
    report = mask_dataset(Dataset.from_list(rows), PromptMasker(tokenizer_for_template("nemotron_3_nano"))).report
    assert report.modes == {"default": 4, "enable_thinking=False": 1}


def test_drops_are_counted_by_code_with_their_first_rows() -> None:
    rows = [WIZARD if i % 2 else NO_ANSWER if i % 5 == 0 else PLAIN for i in range(16)]
    report = masked(rows, errors="drop").report
    assert set(report.failures) == {"bad_schema", "no_supervised_tokens"}
    assert report.failures["bad_schema"].count == 8
    assert report.failures["bad_schema"].first_rows == [1, 3, 5, 7, 9]
    assert len(report.failures["bad_schema"].first_rows) == FIRST_ROWS
    assert "wizard" in report.failures["bad_schema"].example
    assert report.failures["no_supervised_tokens"].count == 2
    assert report.failures["no_supervised_tokens"].first_rows == [0, 10]
    assert report.dropped_rows == 10
    assert report.rows_out == 6
    assert not report.ok


@pytest.mark.parametrize("overflow", ["truncate", "keep_turns"])
def test_what_overflow_cuts_off_is_counted(overflow: str) -> None:
    long = {
        "messages": [user("Hi"), assistant("Hello!"), user("Count."), assistant("one two three four five six " * 3)]
    }
    whole = masked([PLAIN, long]).dataset
    widths = [len(row["input_ids"]) for row in whole]
    first_answer = runs(whole[1]["labels"])[0][1]
    limit = widths[1] - 3
    assert widths[0] <= limit  # guard: one row fits, the other does not
    made, report = masked([PLAIN, long], max_length=limit, overflow=overflow)
    kept = limit if overflow == "truncate" else first_answer
    assert len(made[1]["input_ids"]) == kept
    assert report.cut_rows == 1
    assert report.lost_tokens == widths[1] - kept
    lost = [label for label in whole[1]["labels"][kept:] if label != IGNORE]
    assert report.lost_supervised_tokens == len(lost) > 0
    assert report.tokens == widths[0] + kept
    assert sum(report.role_tokens.values()) == report.tokens
    assert ("cut by overflow" in str(report)) is True


def test_overflow_that_drops_is_a_failure_by_code() -> None:
    report = masked([PLAIN, SPLIT], max_length=len(masked([PLAIN]).dataset[0]["input_ids"]) - 1, overflow="drop").report
    assert report.failures["overflow"].first_rows[0] == 0
    assert report.rows_out == 2 - (report.failures["overflow"].count - 1)


def test_a_stop_token_is_counted_where_a_run_ends_and_nowhere_else() -> None:
    eos = tokenizer_of().eos_token_id
    other = tokenizer_of().convert_tokens_to_ids("<|im_start|>")
    rows = [
        {"input_ids": [5, eos, 7, eos], "labels": [IGNORE, IGNORE, 7, eos]},
        {"input_ids": [5, 6, other, 7, 8, eos], "labels": [IGNORE, 6, other, IGNORE, 8, eos]},
    ]
    report = masked(rows, stop_token_ids=[eos, other]).report
    assert report.stop_tokens == {"<|im_end|>": 2, "<|im_start|>": 1}
    assert report.supervised_runs == 3


def test_the_longest_rows_come_first_with_their_numbers() -> None:
    rows = [{"prompt": "a", "response": "b " * n} for n in (3, 9, 1, 7, 5, 8, 2)]
    made, report = masked(rows)
    widths = [len(row["input_ids"]) for row in made]
    expected = sorted(enumerate(widths), key=lambda pair: -pair[1])[:FIRST_ROWS]
    assert report.longest == expected
    assert [row for row, _ in report.longest] == [1, 5, 3, 4, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Repeated prefixes
# ---------------------------------------------------------------------------------------------------------------------


def naive(prompts: list[list[int]]) -> int:
    """Tokens whose path from the root of a prefix tree was there before."""
    tree: dict[int, Any] = {}
    repeated = 0
    for prompt in prompts:
        node = tree
        for token in prompt[:PREFIX_TOKENS]:
            repeated += token in node
            node = node.setdefault(token, {})
    return repeated


def test_golden_repeated_prefixes() -> None:
    prompts = [np.array(p) for p in ([1, 2, 3], [1, 2, 4], [1, 5])]
    assert repeated_prefixes(prompts) == RepeatedPrefixes(tokens=3, prompt_tokens=8, rows=3)
    assert repeated_prefixes([]) == RepeatedPrefixes(0, 0, 0)
    assert repeated_prefixes([np.array([], np.int64)] * 2) == RepeatedPrefixes(0, 0, 2)
    assert repeated_prefixes([np.array([7, 8])] * 4) == RepeatedPrefixes(6, 8, 4)
    long = np.arange(PREFIX_TOKENS + 100)
    assert repeated_prefixes([long, long]) == RepeatedPrefixes(PREFIX_TOKENS, 2 * PREFIX_TOKENS, 2)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from([0, 1, 2, 255, 256, 65536, 151_000]), max_size=6), max_size=9))
def test_repeated_prefixes_are_what_a_prefix_tree_shares(prompts: list[list[int]]) -> None:
    found = repeated_prefixes([np.array(prompt, np.int32) for prompt in prompts])
    assert found.tokens == naive(prompts)
    assert found.prompt_tokens == sum(map(len, prompts))
    assert found.rows == len(prompts)


def test_the_prompts_of_a_dataset_end_where_loss_begins() -> None:
    made, report = masked([PLAIN, SPLIT, PLAIN])
    prompts = [row["input_ids"][: next(i for i, label in enumerate(row["labels"]) if label != IGNORE)] for row in made]
    assert report.repeated_prefixes == RepeatedPrefixes(naive(prompts), sum(map(len, prompts)), 4)


# ---------------------------------------------------------------------------------------------------------------------
# Forms
# ---------------------------------------------------------------------------------------------------------------------


def full_report() -> MaskReport:
    """Every field set, each to a figure that occurs once."""
    return MaskReport(
        rows_in=1001, rows_out=1102, split_rows=203, repeated_tokens=304, dropped_rows=405, tokens=50_006,
        supervised_tokens=10_007, supervised_runs=1208, cut_rows=609, lost_tokens=7010, lost_supervised_tokens=811,
        role_tokens={"trained": 10_007, "user": 3012, "template": 36_987}, stop_tokens={"</s>": 1113, "[end]": 95},
        failures={
            "overflow": Failures(114, [15, 16], "[bold]too[/INST] long", too_long=113),
            "boundary": Failures(7, [9], "joined", first_documents=[4]),
        },
        longest=[(17, 918), (19, 917)], repeated_prefixes=RepeatedPrefixes(tokens=2020, prompt_tokens=40_021, rows=1022),
        notes=["a note of 23 words"],
    )  # fmt: skip


def test_json_holds_every_field() -> None:
    report = full_report()
    data = json.loads(report.to_json())
    assert set(data) == {field.name for field in fields(MaskReport)} | {"supervised_share"}
    assert data["supervised_share"] == 10_007 / 50_006
    assert data["failures"]["overflow"] == {
        "count": 114, "first_rows": [15, 16], "example": "[bold]too[/INST] long", "too_long": 113, "first_documents": [],
    }  # fmt: skip
    assert data["repeated_prefixes"] == {"tokens": 2020, "prompt_tokens": 40_021, "rows": 1022}
    del data["supervised_share"]
    data["failures"] = {code: Failures(**failure) for code, failure in data["failures"].items()}
    data["longest"] = [tuple(pair) for pair in data["longest"]]
    data["repeated_prefixes"] = RepeatedPrefixes(**data["repeated_prefixes"])
    assert MaskReport(**data) == report


def test_json_of_a_real_report_is_plain_data() -> None:
    report = masked([PLAIN, SPLIT, WIZARD], errors="drop").report
    assert json.loads(report.to_json()) == json.loads(json.dumps(report.to_dict()))


def test_text_has_every_figure_and_no_colour() -> None:
    text = str(full_report())
    assert "\x1b" not in text
    flat = " ".join(text.split())
    for figure in (
        "1,001 in", "1,102 out", "405 dropped", "203 rows", "304", "50,006", "10,007", "20.0%", "1,208", "609 rows", "7,010",
        "811", "user 3,012", "template 36,987", "×1,113", "×95", "#17: 918", "#19: 917", "2,020", "1,022 rows", "overflow",
        "114", "#15, #16", "boundary", "#9 document 5", "a note of 23 words",
    ):  # fmt: skip
        assert figure in flat, figure


def test_text_shows_data_in_brackets_as_it_stands() -> None:
    """Tokens and messages come from data: `[/INST]` in them is text, not markup."""
    text = str(full_report())
    assert "[bold]too[/INST] long" in text
    assert "[end]" in text


def test_text_of_an_empty_report() -> None:
    assert "0 in, 0 out, 0 dropped" in str(MaskReport())
    assert MaskReport().supervised_share == 0.0
