"""Whatever a row or a tokenizer has wrong with it: a clear error with code, row and remedy, or a counted drop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator, mask_dataset
from testkit import mask_oracle
from testkit.conversations import assistant, call, user
from testkit.mask_oracle import IGNORE
from testkit.tokenizers import CHATML, build_tokenizer, tokenizer_for_template

GOOD = {"messages": [user("Hello"), assistant("Hi there.")]}


def masker(**options: Any) -> Any:
    return PromptMasker(build_tokenizer("qwen"), **options)


def refused(function: Any, *args: Any, match: str | None = None) -> MaskingError:
    """The MaskingError, which must say what to do and hold no one else's stack trace as its message."""
    with pytest.raises(MaskingError, match=match or None) as caught:
        function(*args)
    error = caught.value
    assert error.code
    assert error.remedy
    assert str(error).startswith(f"[{error.code}]")
    assert "Traceback" not in str(error)
    assert len(str(error)) < 4000, "an error is read by a person"
    return error


# name -> (row, codes, part of the message)
ROWS: dict[str, tuple[Any, set[str], str]] = {
    "empty row": ({}, {"bad_schema"}, "messages"),
    "unknown columns": ({"question": "a", "reply": "b"}, {"bad_schema"}, "question"),
    "only a prompt": ({"prompt": "a"}, {"bad_schema"}, "prompt"),
    "row is a list": ([1, 2], {"bad_schema"}, ""),
    "row is a string": ("Hello", {"bad_schema"}, ""),
    "messages is a number": ({"messages": 3}, {"bad_schema"}, "messages"),
    "messages is text": ({"messages": "Hello"}, {"bad_schema"}, "messages"),
    "no messages": ({"messages": []}, {"bad_schema", "no_supervised_tokens"}, ""),
    "message is a string": ({"messages": ["Hello", "Hi"]}, {"bad_schema"}, ""),
    "message without role": ({"messages": [{"content": "a"}, assistant("b")]}, {"bad_schema"}, "role"),
    "message without content": ({"messages": [user("a"), {"role": "assistant"}]}, {"bad_schema"}, "content"),
    "unknown role": ({"messages": [user("a"), {"role": "wizard", "content": "b"}]}, {"bad_schema"}, "wizard"),
    "unknown ShareGPT role": ({"conversations": [{"from": "wizard", "value": "b"}]}, {"bad_schema"}, "wizard"),
    "None content of a user": ({"messages": [user(None), assistant("b")]}, {"bad_schema"}, "content"),
    "None content of an assistant": ({"messages": [user("a"), assistant(None)]}, {"bad_schema"}, "content"),
    "number as content": ({"messages": [user(3), assistant("b")]}, {"bad_schema"}, "int"),
    "dict as content": ({"messages": [user({"a": 1}), assistant("b")]}, {"bad_schema"}, "dict"),
    "system prompt in two places": (
        {"system": "Be kind.", "messages": [{"role": "system", "content": "Be brief."}, user("a"), assistant("b")]},
        {"bad_schema"},
        "system",
    ),
    "system prompt of another type": ({"system": ["Be kind."], **GOOD}, {"bad_schema"}, "system"),
    "system prompt beside a bare prompt": (
        {"system": "Be kind.", "prompt": "a", "response": "b"},
        {"bad_schema"},
        "system",
    ),
    "KTO's bad answer": ({"prompt": "a", "completion": "b", "label": False}, {"bad_schema"}, "label"),
    "Alpaca with earlier turns of another form": (
        {"instruction": "a", "output": "b", "history": ["c", "d"]},
        {"bad_schema"},
        "history",
    ),
    "images beside the text": ({"images": ["cat.png"], **GOOD}, {"bad_schema"}, "images"),
    "packed row": (
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "seq_lengths": [2, 2]},
        {"already_packed"},
        "seq_lengths",
    ),
    "image": (
        {"messages": [user([{"type": "image"}, {"type": "text", "text": "What?"}]), assistant("A cat.")]},
        {"bad_schema"},
        "multimodal|image",
    ),
    "lone surrogate": ({"messages": [user("a\ud800b"), assistant("b")]}, {"bad_schema"}, "surrogate"),
    "lone surrogate in answer": ({"messages": [user("a"), assistant("\udfffb")]}, {"bad_schema"}, "surrogate"),
    "lone surrogate in strings": ({"prompt": "a", "response": "\ud83d"}, {"bad_schema"}, "surrogate"),
    "lone surrogate in reasoning": (
        {"messages": [user("a"), assistant("b", reasoning_content="\ud800")]},
        {"bad_schema", "content_lost"},
        "",
    ),
    "response of a wrong type": ({"prompt": "a", "response": 3}, {"bad_schema"}, "int"),
    "prompt string, completion list": ({"prompt": "a", "completion": [assistant("b")]}, {"bad_schema"}, "prompt"),
    "tools is a number": ({**GOOD, "tools": 3}, {"bad_schema"}, "tools"),
    "tool calls is a string": (
        {"messages": [user("a"), assistant("b", tool_calls="call")]},
        {"bad_schema"},
        "tool_calls",
    ),
    "tool call is empty": (
        {"messages": [user("a"), assistant("b", tool_calls=[{}])]},
        {"bad_schema", "content_lost"},
        "",
    ),
    "tool call lost": ({"messages": [user("a"), assistant("b", tool_calls=[call({"c": 1})])]}, {"content_lost"}, ""),
    "template kwargs is a string": ({**GOOD, "chat_template_kwargs": "x"}, {"bad_schema"}, "chat_template_kwargs"),
    "weight of a half": ({"messages": [user("a"), assistant("b", weight=0.5)]}, {"bad_schema"}, "weight"),
    "only a user": ({"messages": [user("a")]}, {"no_supervised_tokens"}, ""),
    "ids are text": ({"input_ids": "1 2 3", "labels": [1, 2, 3]}, {"bad_schema"}, "input_ids"),
    "ids are floats": ({"input_ids": [1.5, 2.0], "labels": [-100, 2]}, {"bad_schema"}, "input_ids"),
    "ids are nested": ({"input_ids": [[1, 2]], "labels": [[-100, 2]]}, {"bad_schema"}, "input_ids"),
    "no ids": ({"input_ids": [], "labels": []}, {"no_supervised_tokens", "bad_schema"}, ""),
    "negative id": ({"input_ids": [1, -5, 2], "labels": [-100, -100, 2]}, {"id_out_of_range"}, "-5"),
    "id too large": ({"input_ids": [1, 999_999], "labels": [-100, 999_999]}, {"id_out_of_range"}, "999"),
    "label is another id": ({"input_ids": [1, 2, 3], "labels": [-100, 7, 3]}, {"label_mismatch"}, "7"),
    "first label supervised": ({"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"first_label"}, "first"),
    "mask too short": ({"input_ids": [1, 2, 3], "completion_mask": [0, 1]}, {"length_mismatch"}, "completion_mask"),
    "mask too long": ({"input_ids": [1, 2], "assistant_masks": [0, 1, 1]}, {"length_mismatch"}, "assistant_masks"),
    "mask of other values": ({"input_ids": [1, 2, 3], "completion_mask": [0, 2, 1]}, {"bad_schema"}, "completion_mask"),
    "ids without mask": ({"input_ids": [1, 2, 3]}, {"bad_schema"}, "labels"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_a_clear_error(name: str) -> None:
    row, codes, match = ROWS[name]
    assert refused(masker().encode, row, match=match).code in codes


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_a_counted_drop_where_drops_are_asked_for(name: str) -> None:
    """errors="drop": the bad row yields nothing and the report counts it under its code, the good rows stay."""
    row, codes, _ = ROWS[name]
    if not isinstance(row, dict):
        pytest.skip("a dataset's rows are mappings")
    try:
        dataset = Dataset.from_list([row, row])
    except Exception as error:
        pytest.skip(f"Arrow itself does not hold this row: {type(error).__name__}")
    if not dataset.column_names:
        pytest.skip("no columns, no rows")
    try:
        made = mask_dataset(dataset, masker(errors="drop"))
    except MaskingError as error:  # a data set of nothing but bad rows may be refused as a whole
        assert error.code in (*codes, "no_supervised_tokens", "bad_schema")  # noqa: PT017
    else:
        assert len(made.dataset) == 0
        assert any(code in str(made.report) for code in codes)


def test_the_row_number_is_in_the_error() -> None:
    rows = [GOOD, GOOD, {"messages": [user("Hello"), {"role": "wizard", "content": "b"}]}, GOOD]
    error = refused(mask_dataset, Dataset.from_list(rows), masker(), match="wizard")
    assert error.row == 2
    assert "row 2" in str(error)


def test_drops_are_counted_with_their_row_numbers() -> None:
    bad = {"messages": [user("Hello"), {"role": "wizard", "content": "b"}]}
    none = {"messages": [user("Hello")]}
    made = mask_dataset(Dataset.from_list([GOOD, bad, GOOD, none, bad]), masker(errors="drop"))
    assert len(made.dataset) == 2
    text = made.report.to_json() if hasattr(made.report, "to_json") else str(made.report)
    assert "bad_schema" in text
    assert "no_supervised_tokens" in text


def test_an_empty_data_set_is_a_clear_error() -> None:
    for dataset in (
        Dataset.from_list([]),
        Dataset.from_dict({"messages": []}),
        Dataset.from_dict({"prompt": [], "response": []}),
    ):
        refused(mask_dataset, dataset, masker(), match="empty|no rows|0 rows|columns")


def test_unknown_columns_name_what_was_found_and_what_is_taken() -> None:
    error = refused(mask_dataset, Dataset.from_dict({"question": ["a"], "reply": ["b"]}), masker(), match="question")
    for name in ("reply", "messages", "prompt", "input_ids", "instruction"):
        assert name in str(error)


def test_a_megabyte_in_one_turn_is_masked_or_overflows() -> None:
    text = "All work and no play. " * 50_000
    row = {"messages": [user(text), assistant("Yes. " * 1000)]}
    tokenizer = build_tokenizer("qwen")
    (made,) = PromptMasker(tokenizer).encode(row)
    assert mask_oracle.structure(tokenizer, list(made.input_ids), list(made.labels)) == []
    assert list(made.labels).count(tokenizer.eos_token_id) == 1
    error = refused(PromptMasker(tokenizer, max_length=2048).encode, row, match="2048|2,048")
    assert error.code == "overflow"


def test_a_tokenizer_without_template_is_a_clear_error() -> None:
    tokenizer = build_tokenizer("qwen", chat_template=None)
    refused(lambda: PromptMasker(tokenizer).encode(GOOD), match="chat_template|chat template")
    rows = PromptMasker(tokenizer, chat_template=CHATML).encode(GOOD)
    assert mask_oracle.violations(build_tokenizer("qwen"), GOOD, rows, stop_ids={tokenizer.eos_token_id}) == []


def test_a_tokenizer_without_eos_is_a_clear_error() -> None:
    """Strings end with EOS or not at all; a conversation may still end with the template's own end of turn."""
    tokenizer = build_tokenizer("qwen", eos=None)
    assert tokenizer.eos_token_id is None
    error = refused(lambda: PromptMasker(tokenizer).encode({"prompt": "a", "response": "b"}), match="(?i)eos|stop")
    assert error.code == "missing_stop"
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = PromptMasker(tokenizer, stop_token_ids=[stop]).encode(GOOD)
    assert mask_oracle.violations(tokenizer, GOOD, rows, stop_ids={stop}) == []


def test_a_tokenizer_without_pad_still_collates() -> None:
    tokenizer = build_tokenizer("qwen", pad=None)
    assert tokenizer.pad_token_id is None
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    batch = StrictPromptMaskingCollator(tokenizer)(rows)
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 6, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert tokenizer.pad_token_id is None


def test_a_template_that_raises_is_named_with_its_reason() -> None:
    row = {"messages": [{"role": "system", "content": "x"}, user("a"), assistant("b")]}
    refused(PromptMasker(tokenizer_for_template("gemma")).encode, row, match="System role not supported")
    broken = build_tokenizer("qwen", chat_template="{{ messages[0].content.nothing.here }}")
    refused(PromptMasker(broken).encode, GOOD, match="(?i)template")
    unparsable = build_tokenizer("qwen", chat_template="{% for m in messages %}")
    refused(lambda: PromptMasker(unparsable).encode(GOOD), match="(?i)template")


@pytest.mark.parametrize("kind", ["llama3", "sp-bpe", "sp-bpe-slow", "qwen"])
def test_an_empty_prompt_is_a_bos_or_refused(kind: str) -> None:
    """Text alone, trained from the first token on: a BOS is all that it is predicted from."""
    tokenizer = build_tokenizer(kind)
    row = {"prompt": "", "response": "Hi there."}
    if tokenizer.bos_token_id is None:
        assert refused(PromptMasker(tokenizer).encode, row).code == "no_prompt"
        return
    (made,) = PromptMasker(tokenizer).encode(row)
    assert made.input_ids[:1] == [tokenizer.bos_token_id] == tokenizer("")["input_ids"]
    assert made.labels == [IGNORE, *made.input_ids[1:]]
    assert tokenizer.decode(made.input_ids[1:-1]).lstrip(" ") == "Hi there."
    assert made.input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "given", [{"reasoning_content": "", "thinking": "Why."}, {"reasoning": "How.", "thinking": "Why."}]
)
def test_reasoning_under_a_name_that_the_template_does_not_know_is_not_lost(given: dict[str, str]) -> None:
    """Merged data sets give every message all the names of reasoning; those in use must be rendered."""
    row = {"messages": [user("a"), assistant("b", **given)]}
    assert refused(PromptMasker(tokenizer_for_template("qwen3")).encode, row).code == "content_lost"
    (made,) = PromptMasker(tokenizer_for_template("qwen3")).encode(
        {"messages": [user("a"), assistant("b", thinking="", reasoning_content="Why.")]}
    )
    assert "Why." in tokenizer_for_template("qwen3").decode(made.input_ids)


def test_a_system_column_is_a_system_message() -> None:
    """ShareGPT and Alpaca have it beside the turns, and Axolotl reads it there; left out, another prompt would be trained."""
    by = masker()
    (expected,) = by.encode({"messages": [{"role": "system", "content": "Be kind."}, *GOOD["messages"]]})
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi there."}]
    question, answer = ([message] for message in GOOD["messages"])
    for row in (
        GOOD,
        {"conversations": turns},
        {"prompt": question, "completion": answer},
        {"instruction": "Hello", "output": "Hi there."},
        {"messages": [{"role": "system", "content": "Be kind."}, *GOOD["messages"]]},
    ):
        assert by.encode({**row, "system": "Be kind."}) == [expected]
        for none in (None, ""):
            assert by.encode({**row, "system": none}) == by.encode(row)


def test_something_that_is_no_tokenizer_is_refused() -> None:
    for thing in (None, "gpt2", 3, object()):
        refused(PromptMasker, thing, match="(?i)tokenizer")


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([{"input_ids": [1, 2], "labels": [-100]}], {"length_mismatch"}),
        ([{"input_ids": [1, 999_999], "labels": [-100, 999_999]}], {"id_out_of_range"}),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], {"no_supervised_tokens"}),
        ([{"input_ids": [1, 2]}], {"bad_schema"}),
        ([{"text": "Hello"}], {"bad_schema"}),
        ([GOOD], {"bad_schema"}),
        ([], {"bad_schema", "no_supervised_tokens"}),
    ],
    ids=["length", "range", "all masked", "no labels", "text", "raw without masker", "empty batch"],
)
def test_a_bad_batch_names_its_row(rows: list[dict[str, Any]], code: set[str]) -> None:
    tokenizer = build_tokenizer("qwen")
    good = {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([IGNORE, 6])}
    batch = [good, *rows] if rows else []
    error = refused(StrictPromptMaskingCollator(tokenizer), batch)
    assert error.code in code
    assert error.row == (1 if rows else None)


def test_options_of_the_wrong_kind_are_refused() -> None:
    tokenizer = build_tokenizer("qwen")
    for options in ({"max_length": 0}, {"max_length": -1}, {"max_length": "many"}, {"stop_token_ids": [10**6]}):
        with pytest.raises((ValueError, TypeError)):
            PromptMasker(tokenizer, **options)
    with pytest.raises((ValueError, TypeError)):
        StrictPromptMaskingCollator(tokenizer, pad_to_multiple_of=0)
