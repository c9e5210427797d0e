"""M9–M16, M18, M19, M22 of `docs/known-failures.md`: conversations, columns and lengths that other trainers mask wrongly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from datasets import Dataset

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator, check_masks, mask_dataset
from testkit import mask_oracle
from testkit.conversations import BY_NAME, WEATHER_TOOL, assistant, call, tool, user
from testkit.encoding import attempt, code_of, encode_one, supervised_text
from testkit.mask_oracle import IGNORE, decode, runs
from testkit.tokenizers import (
    build_tokenizer,
    stop_ids_for_template,
    tokenizer_for_template,
)


def test_m9_rewritten_history_becomes_one_row_per_turn() -> None:
    """M9: Qwen 3 strips the reasoning of earlier turns; no trained context is one that inference never shows."""
    tokenizer, stop = tokenizer_for_template("qwen3"), stop_ids_for_template("qwen3")
    row = BY_NAME["reasoning_content"].row
    rows = PromptMasker(tokenizer).encode(row)
    assert len(rows) == 2
    assert mask_oracle.violations(tokenizer, row, rows, stop_ids=stop) == []
    assert "Six times seven" not in decode(tokenizer, rows[1].input_ids)
    with pytest.raises(MaskingError) as caught:
        PromptMasker(tokenizer, on_history_rewrite="raise").encode(row)
    assert caught.value.code == "history_rewrite"
    last = encode_one(tokenizer, row, train_on="last")
    assert mask_oracle.violations(tokenizer, row, [last], stop_ids=stop, train_on="last") == []
    # a conversation that needs no split is not split
    assert len(PromptMasker(tokenizer_for_template("qwen2_5")).encode(BY_NAME["many_turns"].row)) == 1


def test_m10_a_prefilled_generation_prompt_is_refused() -> None:
    """M10: the generation prompt opens a think block that the rendered turn lacks."""
    for name in ("deepseekv3", "deepseek_r1_distill"):
        tokenizer = tokenizer_for_template(name)
        assert code_of(PromptMasker(tokenizer).encode, BY_NAME["one_turn"].row) == "render_mismatch"


def test_m11_an_empty_answer_is_refused_or_ends_on_its_stop_token() -> None:
    """M11: never silently a row without a supervised EOS."""
    tokenizer = build_tokenizer("qwen")
    for content in ("", " ", "\n"):
        row = {"messages": [user("Say nothing."), assistant(content)]}
        rows, code = attempt(tokenizer, row)
        assert code in (None, "empty_response")
        for made in rows:
            assert [label for label in made.labels if label != IGNORE][-1] == tokenizer.eos_token_id
    with pytest.raises(MaskingError):
        PromptMasker(tokenizer).encode({"messages": [user("Hello"), assistant(None)]})


@pytest.mark.parametrize("role", ["asistant", "Assistant", "critic", "", None, 3, ["user"], {"a": 1}])
def test_m12_unknown_roles_raise(role: Any) -> None:
    """M12: a typo in a role trains nothing elsewhere; here it is an error that names the roles."""
    row = {"messages": [user("Hello"), {"role": role, "content": "Hi"}]}
    with pytest.raises(MaskingError, match="assistant") as caught:
        PromptMasker(build_tokenizer("qwen")).encode(row)
    assert caught.value.code == "bad_schema"


def test_m12_unknown_options_raise() -> None:
    """M12: a misspelt option or value is an error that names the allowed ones."""
    tokenizer = build_tokenizer("qwen")
    for options, allowed in [
        ({"train_on": "lasst"}, "last"),
        ({"errors": "ignore"}, "drop"),
        ({"on_history_rewrite": "keep"}, "split"),
        ({"overflow": "cut"}, "truncate"),
        ({"special_tokens_in_content": "maybe"}, "raise"),
    ]:
        with pytest.raises(ValueError, match=allowed):
            PromptMasker(tokenizer, **options)
    with pytest.raises(TypeError):
        PromptMasker(tokenizer, trian_on="last")
    for flag in ({"weight": 0.5}, {"weight": "1"}, {"train": "yes"}):
        assert (
            code_of(PromptMasker(tokenizer).encode, {"messages": [user("a"), assistant("b", **flag)]}) == "bad_schema"
        )


def test_m13_rows_without_any_supervised_token_are_refused() -> None:
    """M13: nothing to train, in text and in tokenised rows, is an error; under errors="drop" it is a counted drop."""
    tokenizer = build_tokenizer("qwen")
    masker = PromptMasker(tokenizer)
    ids = tokenizer("Hello there<|im_end|>")["input_ids"]
    empty = [
        {"messages": [user("Hello"), assistant("Hi", weight=0)]},
        {"messages": [user("Hello")]},
        {"input_ids": ids, "labels": [IGNORE] * len(ids)},
        {"input_ids": ids, "completion_mask": [0] * len(ids)},
    ]
    for row in empty:
        assert code_of(masker.encode, row) == "no_supervised_tokens"
    assert code_of(StrictPromptMaskingCollator(tokenizer), [{"input_ids": ids, "labels": [IGNORE] * len(ids)}]) == (
        "no_supervised_tokens"
    )


def test_m13_truncation_never_leaves_a_row_without_loss() -> None:
    """M13: a row cut before its answer begins is an error or a drop, never a row of -100."""
    tokenizer = build_tokenizer("qwen")
    row = {"messages": [user("A long question. " * 20), assistant("Yes.")]}
    for overflow in ("raise", "truncate", "drop"):
        rows, code = attempt(tokenizer, row, max_length=16, overflow=overflow)
        assert rows == []
        assert code in ("overflow", "no_supervised_tokens") or (overflow == "drop" and code is None)


def test_m14_mask_columns_are_always_honoured() -> None:
    """M14: `input_ids` with a mask column and nothing else never trains the whole row."""
    tokenizer = build_tokenizer("qwen")
    ids = tokenizer("Hello there")["input_ids"] + [tokenizer.eos_token_id]
    mask = [0] * (len(ids) - 2) + [1, 1]
    for columns in (
        {"completion_mask": mask},
        {"assistant_masks": mask},
        {"completion_mask": mask, "assistant_masks": mask},
    ):
        made = encode_one(tokenizer, {"input_ids": ids, **columns})
        assert list(made.labels) == [i if m else IGNORE for i, m in zip(ids, mask, strict=True)]
    both = {"completion_mask": [0] + [1] * (len(ids) - 1), "assistant_masks": mask}
    assert list(encode_one(tokenizer, {"input_ids": ids, **both}).labels)[:-2] == [IGNORE] * (len(ids) - 2)
    assert code_of(PromptMasker(tokenizer).encode, {"input_ids": ids}) == "bad_schema"
    batch = StrictPromptMaskingCollator(tokenizer)([{"input_ids": ids, "completion_mask": mask}])
    assert batch["labels"][0].tolist() == [i if m else IGNORE for i, m in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("column", ["labels", "completion_mask", "assistant_masks"])
@pytest.mark.parametrize("delta", [-1, 1])
def test_m15_columns_of_another_length_are_refused(column: str, delta: int) -> None:
    """M15: a mask shorter or longer than the ids."""
    tokenizer = build_tokenizer("qwen")
    ids = tokenizer("Hello there")["input_ids"] + [tokenizer.eos_token_id]
    row = {"input_ids": ids, column: [0, *[1] * (len(ids) - 1 + delta)]}
    assert code_of(PromptMasker(tokenizer).encode, row) == "length_mismatch"
    assert code_of(StrictPromptMaskingCollator(tokenizer), [row]) == "length_mismatch"


def test_m16_every_trainable_turn_is_supervised() -> None:
    """M16: four answers, four supervised runs; a row that leaves one out is seen by the audit of tokenised rows."""
    tokenizer = build_tokenizer("qwen")
    made = encode_one(tokenizer, BY_NAME["many_turns"].row)
    texts = supervised_text(tokenizer, made)
    assert [t.removesuffix("<|im_end|>") for t in texts] == ["Hello! How are you?", "I'm fine.", "I'm fine.", "Bye!"]
    mask = [int(label != IGNORE) for label in made.labels]
    start, end = runs(made.labels)[1]
    mask[start:end] = [0] * (end - start)
    row = {"input_ids": list(made.input_ids), "assistant_masks": mask}
    assert code_of(PromptMasker(tokenizer).encode, row) == "unsupervised_turn"


def test_m18_tools_consecutive_assistants_and_last_turn_only() -> None:
    """M18: all work; tool calls are trained, tool results are not."""
    tokenizer, stop = tokenizer_for_template("qwen2_5"), stop_ids_for_template("qwen2_5")
    for name in ("tools", "tools_with_text_and_two_calls", "consecutive_assistants"):
        row = BY_NAME[name].row
        rows = PromptMasker(tokenizer).encode(row)
        assert mask_oracle.violations(tokenizer, row, rows, stop_ids=stop) == []
        last = encode_one(tokenizer, row, train_on="last")
        assert mask_oracle.violations(tokenizer, row, [last], stop_ids=stop, train_on="last") == []
        assert len(runs(last.labels)) == 1
    (made,) = PromptMasker(tokenizer).encode(BY_NAME["tools"].row)
    trained = "".join(supervised_text(tokenizer, made))
    assert "get_weather" in trained
    assert "celsius" not in trained


def test_m19_keys_that_columns_fill_with_none_never_reach_the_template() -> None:
    """M19: datasets gives every struct of a column the union of keys; the rows come out as they went in."""
    tokenizer, stop = tokenizer_for_template("qwen2_5"), stop_ids_for_template("qwen2_5")
    rows = [
        {
            "messages": [
                user("Weather?"),
                assistant("", tool_calls=[call({"city": "Paris"})]),
                tool("21"),
                assistant("21 degrees."),
            ],
            "tools": [WEATHER_TOOL],
        },
        {
            "messages": [user("Time?"), assistant("", tool_calls=[call({"zone": "CET"}, name="get_time")])],
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "get_time", "description": "", "parameters": {"type": "object"}},
                }
            ],
        },
    ]
    dataset = Dataset.from_list(copy.deepcopy(rows))
    filled = dataset[0]
    assert filled["messages"][1]["tool_calls"][0]["function"]["arguments"].get("zone", "absent") is None, "not filled"
    for row, stored in zip(rows, dataset, strict=True):
        ours, plain = PromptMasker(tokenizer).encode(stored), PromptMasker(tokenizer).encode(row)
        assert [list(r.input_ids) for r in ours] == [list(r.input_ids) for r in plain]
        assert mask_oracle.violations(tokenizer, row, ours, stop_ids=stop) == []


def test_m22_overflow_follows_a_policy_and_leaves_no_false_stop() -> None:
    """M22: too long raises; a truncated row is a prefix of the full row without a stop of its own; drops count."""
    tokenizer = build_tokenizer("qwen")
    row = BY_NAME["very_long_turn"].row
    full = encode_one(tokenizer, row)
    limit = 64
    assert code_of(PromptMasker(tokenizer, max_length=limit).encode, row) == "overflow"
    cut = encode_one(tokenizer, row, max_length=limit, overflow="truncate")
    assert len(cut.input_ids) <= limit
    assert list(cut.input_ids) == list(full.input_ids[: len(cut.input_ids)])
    assert list(cut.labels) == list(full.labels[: len(cut.labels)])
    assert tokenizer.eos_token_id not in cut.labels
    assert encode_one(tokenizer, row, max_length=len(full.input_ids)).input_ids == full.input_ids
    dropped = mask_dataset(
        Dataset.from_list([row, BY_NAME["one_turn"].row]), PromptMasker(tokenizer, max_length=limit, overflow="drop")
    )
    assert len(dropped.dataset) == 1
    assert "overflow" in str(dropped.report)


def test_audit_sees_rows_that_others_mislabelled() -> None:
    """M1, M7, M8 in rows labelled elsewhere: the audit accepts ours and reports a stop that is not supervised."""
    tokenizer = build_tokenizer("qwen")
    made = encode_one(tokenizer, BY_NAME["many_turns"].row)
    good = {"input_ids": list(made.input_ids), "labels": list(made.labels)}
    bad = copy.deepcopy(good)
    bad["labels"] = [IGNORE if label == tokenizer.eos_token_id else label for label in bad["labels"]]
    fine, faulty = check_masks(Dataset.from_list([good]), tokenizer), check_masks(Dataset.from_list([bad]), tokenizer)
    assert str(fine) != str(faulty)
    assert "missing_stop" in str(faulty)
