"""M27, M28, M30–M32, M39 of `docs/known-failures.md`: flags, columns and names are read as meant, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import IterableDataset

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, mask_dataset
from testkit.conversations import WEATHER_TOOL, assistant, call, system, tool, user
from testkit.encoding import SUM, bare, bare_code, masked, refusal_code
from testkit.tokenizers import build_tokenizer, tokenizer_for_template

# --- M27: do not train this -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag", [{"loss": False}, {"loss_mask": 0}, {"trainable": False}, {"training": False}, {"loss_scale": 0.0}]
)
def test_m27_spellings_of_do_not_train_are_honoured(flag: dict[str, Any]) -> None:
    """M27: as `train` false."""
    row = [user("a"), assistant("b", **flag), user("c"), assistant("d")]
    assert bare({"messages": row}) == bare(
        {"messages": [user("a"), assistant("b", train=False), user("c"), assistant("d")]}
    )


REFUSED_FLAGS: list[dict[str, Any]] = [
    {"messages": [user("a"), assistant("b", mask=False)]},
    {"messages": [user("a"), assistant("b", weight=1, train=False)]},
    {"messages": [user("a", train=True), assistant("b")]},
    {
        "messages": [
            user("a"),
            assistant([{"type": "text", "text": "b", "train": False}, {"type": "text", "text": "c"}]),
        ]
    },
    *({"messages": SUM, "label": no} for no in (False, 0, "false", -1)),
    {"messages": SUM, "kto_tag": False},
    {"messages": SUM, "rejected": "It is five."},
    {"messages": SUM, "chosen": [assistant("Four.")]},
    {"messages": SUM, "loss_mask": 0},
    {"prompt": "a", "completion": "b", "label": 0},
]


@pytest.mark.parametrize("row", REFUSED_FLAGS, ids=str)
def test_m27_other_keys_that_decide_what_is_trained_are_refused(row: dict[str, Any]) -> None:
    """M27: never trained as if they were not there."""
    assert bare_code(row) == "bad_schema"


# --- M28: columns that belong to the prompt ---------------------------------------------------------------------------


def test_m28_columns_of_known_meaning_are_read() -> None:
    """M28: `functions`, `system_prompt`, `enable_thinking`, `history`."""
    plain = {"messages": SUM, "tools": [WEATHER_TOOL]}
    assert masked("qwen2_5", {"messages": SUM, "functions": [WEATHER_TOOL["function"]]}) == masked("qwen2_5", plain)
    assert bare({"messages": SUM, "system_prompt": "Be kind."}) == bare({"messages": [system("Be kind."), *SUM]})
    off = {"messages": SUM, "chat_template_kwargs": {"enable_thinking": False}}
    assert masked("qwen3", {"messages": SUM, "enable_thinking": False}) == masked("qwen3", off)
    told = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]}
    assert bare(told) == bare({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]})


@pytest.mark.parametrize(
    "columns",
    [{"context": "Paris is big."}, {"history": [["a", "b"]]}, {"prompt": "Something else"}, {"persona": "a pirate"}],
)
def test_m28_other_columns_of_a_prompt_are_refused_by_name_unless_ignored(columns: dict[str, Any]) -> None:
    """M28: an error that names the column, and `ignore_columns` for those meant to be ignored."""
    row = {"messages": SUM, **columns}
    assert bare_code(row) == "bad_schema"
    assert bare(row, ignore_columns=list(columns)) == bare({"messages": SUM})
    assert bare({"messages": SUM, **dict.fromkeys(columns)}) == bare({"messages": SUM})


def test_m28_a_variable_of_the_template_is_no_column_to_ignore() -> None:
    """M28: a column that has the name of what the template reads."""
    template = "{{ tone }}" + build_tokenizer("qwen").chat_template
    by = PromptMasker(build_tokenizer("qwen", chat_template=template))
    with pytest.raises(MaskingError, match="tone"):
        by.encode({"messages": SUM, "tone": "kind"})
    assert by.encode({"messages": SUM, "chat_template_kwargs": {"tone": "kind"}})


def test_m28_documents_are_in_the_prompt_or_the_row_is_refused() -> None:
    """M28: `documents` under a template that does not know them."""
    assert (
        refusal_code("llama3", {"messages": SUM, "documents": [{"title": "t", "text": "Paris is big."}]})
        == "content_lost"
    )


# --- M30, M31, M32, M39 -----------------------------------------------------------------------------------------------


def test_m30_a_stream_gives_rows_of_one_schema() -> None:
    """M30: later rows bring a new column, and one of them is dropped."""

    def rows() -> Any:
        for i in range(600):
            extra = {"extra": i} if i > 300 else {}
            yield {"messages": [user("a")] if i == 400 else SUM, **extra}

    made, report = mask_dataset(
        IterableDataset.from_generator(rows), PromptMasker(build_tokenizer("qwen"), errors="drop")
    )
    assert {tuple(row) for row in made} == {("input_ids", "labels")}
    assert report.dropped_rows == 1


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"properties": {"a": value}}
    return value


@pytest.mark.parametrize("depth", [30, 100, 150, 200, 240, 300, 3000])
def test_m31_a_schema_of_any_depth_is_a_row_or_our_error(depth: int) -> None:
    """M31: wherever the recursion ends, it ends in an error of ours."""
    row = {"messages": SUM, "tools": [{"name": "f", "parameters": nested(depth)}]}
    by = PromptMasker(tokenizer_for_template("qwen3"))
    try:
        assert by.encode(row)
    except MaskingError as error:
        assert depth >= 100 and error.code in ("bad_schema", "template_error")  # noqa: PT017, PT018


def test_m31_names_that_are_numbers_are_rendered_or_refused() -> None:
    """M31: Python mappings may have them; JSON writes them as text."""
    row = {"messages": SUM, "tools": [{"name": "f", "parameters": {"properties": {1: {}, "b": {}}}}]}
    assert PromptMasker(tokenizer_for_template("qwen3")).encode(row)


DEEP = "[" * 2000 + "]" * 2000


BARE_EXCEPTIONS: list[dict[str, Any]] = [
    {"messages": SUM, "tools": ["name"]},
    {"messages": SUM, "tools": 7},
    {"conversations": [{"from": ["human"], "value": "a"}]},
    {"messages": SUM, "tools": DEEP},
    {"messages": DEEP},
    {"messages": [user("a"), assistant("", tool_calls=[call({})]), tool({"celsius": 21}), assistant("b")]},
    {"messages": [user("a"), assistant("", tool_calls=[call({})]), tool([1, 2]), assistant("b")]},
    {"messages": SUM, "chat_template_kwargs": {"tokenize": True}},
]


@pytest.mark.parametrize("row", BARE_EXCEPTIONS, ids=lambda row: str(row)[:60])
def test_m31_nothing_but_our_errors_leaves_the_masker(row: dict[str, Any]) -> None:
    """M31: TypeError, JSONDecodeError and RecursionError before."""
    assert bare_code(row) == "bad_schema"


def test_m31_json_text_is_read() -> None:
    """M31: `tools` as "null" or one schema, `chat_template_kwargs`, `tool_calls`."""
    plain = {"messages": SUM}
    assert bare({**plain, "tools": "null"}) == bare(plain)
    assert masked("qwen2_5", {**plain, "tools": json.dumps(WEATHER_TOOL)}) == masked(
        "qwen2_5", {**plain, "tools": [WEATHER_TOOL]}
    )
    off = {"enable_thinking": False}
    assert masked("qwen3", {**plain, "chat_template_kwargs": json.dumps(off)}) == masked(
        "qwen3", {**plain, "chat_template_kwargs": off}
    )
    calls = [call({"city": "Paris"})]
    assert masked("qwen2_5", {"messages": [user("a"), assistant("", tool_calls=json.dumps(calls))]}) == masked(
        "qwen2_5", {"messages": [user("a"), assistant("", tool_calls=calls)]}
    )


def test_m32_blank_fields_of_alpaca_are_absent() -> None:
    """M32: an empty instruction, a blank input."""
    asked = bare({"messages": [user("What is it?"), assistant("A cat.")]})
    for row in ({"instruction": "", "input": "What is it?"}, {"instruction": "What is it?", "input": " \n "}):
        assert bare({**row, "output": "A cat."}) == asked
    assert bare_code({"instruction": " ", "input": "", "output": "A cat."}) == "bad_schema"


def test_m39_names_of_roles_are_known_or_mapped() -> None:
    """M39: what the field calls its speakers, and `roles` for other names."""
    called = [
        user("a"),
        assistant(None, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"b": 1}}}]),
    ]
    rows = {"messages": [*called, {"role": "tool", "content": "1"}, assistant("c")]}
    spoken = [("human", "a"), ("tool_call", '{"name": "f", "arguments": {"b": 1}}'), ("ipython", "1"), ("gpt", "c")]
    for key, text in (("from", "value"), ("role", "content")):
        row = {"conversations": [{key: who, text: what} for who, what in spoken]}
        assert masked("qwen2_5", row) == masked("qwen2_5", rows)
    critic = {"messages": [{"role": "critic", "content": "a"}, assistant("b")]}
    assert bare(critic, roles={"critic": "user"}) == bare({"messages": [user("a"), assistant("b")]})
    with pytest.raises(MaskingError, match="roles"):
        bare(critic, roles={"critic": "wizard"})


def test_m39_a_thought_before_a_call_is_kept() -> None:
    """M39: ShareGPT's `function_call` with a thought in front of its JSON."""
    row = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": 'I look it up.\n{"name": "f", "arguments": {"b": "c"}}'},
        ]
    }
    text, trained = masked("qwen2_5", row)
    assert "I look it up." in trained
    assert '"name": "f"' in trained
    assert text.endswith("<|im_end|>")
