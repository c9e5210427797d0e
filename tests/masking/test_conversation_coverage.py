"""The whole conversation is in what is trained, in the form that the template takes, or the row is refused and counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, mask_dataset
from testkit.conversations import WEATHER_TOOL, assistant, call, parts, system, tool, user
from testkit.mask_oracle import IGNORE
from testkit.tokenizers import build_tokenizer, tokenizer_for_template

PLAIN = [user("What is 2 + 2?"), assistant("It is four.")]


def masked(name: str, row: dict[str, Any], **options: Any) -> tuple[str, str]:
    """The text of the rows that template `name` makes, and of what is supervised in them."""
    tokenizer = tokenizer_for_template(name)
    rows = PromptMasker(tokenizer, **options).encode(row)
    trained = [i for one in rows for i in one.labels if i != IGNORE]
    return "".join(tokenizer.decode(one.input_ids) for one in rows), tokenizer.decode(trained)


def code_of(name: str, row: dict[str, Any], **options: Any) -> str:
    with pytest.raises(MaskingError) as caught:
        PromptMasker(tokenizer_for_template(name), **options).encode(row)
    assert caught.value.remedy
    return caught.value.code


def bare(row: Any, **options: Any) -> Any:
    return PromptMasker(build_tokenizer("qwen"), **options).encode(row)


def bare_code(row: Any, **options: Any) -> str:
    with pytest.raises(MaskingError) as caught:
        bare(row, **options)
    return caught.value.code


# --- M23: arguments of calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "llama3_1", "llama3_2", "gptoss", "gemma4", "deepseekv3", "glm4moe"]
)
@pytest.mark.parametrize("given", ['{"city": "Paris"}', ""])
def test_m23_arguments_as_json_text_give_the_row_of_a_mapping(name: str, given: str) -> None:
    """M23: OpenAI's own form, and "" for none."""

    def outcome(arguments: Any) -> Any:
        row = {"messages": [user("Weather?"), assistant("", tool_calls=[call(arguments)])], "tools": [WEATHER_TOOL]}
        try:
            return [(one.input_ids, one.labels) for one in PromptMasker(tokenizer_for_template(name)).encode(row)]
        except MaskingError as error:
            return error.code

    assert outcome(given) == outcome(json.loads(given or "{}"))


def test_m23_arguments_are_text_where_a_template_takes_text() -> None:
    """M23: a template that concatenates arguments gets JSON of them, never the dictionary as Python prints it."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name ~ c.function.arguments }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = build_tokenizer("qwen", chat_template=template)
    (made,) = PromptMasker(tokenizer).encode({"messages": [user("a"), assistant("b", tool_calls=[call({"c": "d"})])]})
    assert 'get_weather{"c": "d"}' in tokenizer.decode(made.input_ids)


@pytest.mark.parametrize("given", ["city=Paris", "[1, 2]", '{"a": 1, "a": 2}', '{"a":' * 2000 + "1" + "}" * 2000])
def test_m23_arguments_that_are_no_mapping_are_refused(given: str) -> None:
    """M23, M31: no argument is lost in reading, and no exception of the reader comes out."""
    assert bare_code({"messages": [user("a"), assistant("b", tool_calls=[call(given)])]}) == "bad_schema"


# --- M24: nothing vanishes --------------------------------------------------------------------------------------------

LOST = {
    "developer role": ("gemma3", {"messages": [{"role": "developer", "content": "Be brief."}, *PLAIN]}),
    "tools": ("llama3", {"messages": PLAIN, "tools": [WEATHER_TOOL]}),
    "tool result": (
        "phi3",
        {"messages": [user("Weather?"), assistant("I look."), tool("21 degrees"), assistant("21.")]},
    ),
    "call of an untrained turn": (
        "llama3",
        {
            "messages": [
                user("Weather?"),
                assistant("Look.", tool_calls=[call({})], train=False),
                user("And?"),
                assistant("21."),
            ]
        },
    ),
    "a text that stands elsewhere": (
        "phi3",
        {"messages": [user("Is it 21 degrees?"), assistant("I look."), tool("21 degrees"), assistant("21 degrees")]},
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_m24_a_text_that_is_in_no_prompt_is_refused_and_counted(name: str) -> None:
    """M24: the template leaves a message, a tool or a result out."""
    template, row = LOST[name]
    code = code_of(template, row)
    assert code in ("content_lost", "template_error")
    made = mask_dataset(
        Dataset.from_list([row, {"messages": PLAIN}]), PromptMasker(tokenizer_for_template(template), errors="drop")
    )
    assert made.report.failures[code].count == 1
    assert len(made.dataset) == 1


def test_m24_an_answer_inside_other_text_is_no_coverage() -> None:
    """M24: a template that writes the reasoning twice and drops the answer, which is a part of the reasoning."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.reasoning_content if m.reasoning_content else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"messages": [user("6 * 7?"), assistant("42", reasoning_content="Six times seven: 42.")]}
    with pytest.raises(MaskingError) as caught:
        PromptMasker(build_tokenizer("qwen", chat_template=template)).encode(row)
    assert caught.value.code == "content_lost"


def test_m24_a_template_that_looks_at_the_text_is_followed() -> None:
    """M24: the shape of a conversation proves nothing where the text itself decides; then the row is looked at."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ '[cut]' if 'secret' in m.content and m.role == 'user' else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    by = PromptMasker(build_tokenizer("qwen", chat_template=template))
    assert by.encode({"messages": PLAIN})
    with pytest.raises(MaskingError) as caught:
        by.encode({"messages": [user("My secret is 7."), assistant("Good.")]})
    assert caught.value.code == "content_lost"
    assert by.encode({"messages": [user("Tell."), assistant("My secret is 7.")]})


# --- M25, M38: strings and parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3", "cohere2", "smolvlm", "idefics3", "llava_next"])
def test_m25_m38_text_parts_and_strings_give_the_same_row(name: str) -> None:
    """M25, M38: one rule for all templates."""
    strings = [user("What is 2 + 2?"), assistant("It is four."), user("And 3 + 3?"), assistant("Six.")]
    given = [{**one, "content": parts(one["content"])} for one in strings]
    text, _ = masked(name, {"messages": strings})
    assert masked(name, {"messages": given})[0] == text
    assert "type" not in text
    assert all(one["content"] in text for one in strings)


def test_m25_other_names_of_text_parts_are_read() -> None:
    """M25: `input_text`, `output_text`, several parts, and `thinking`."""
    said = [
        {"type": "thinking", "thinking": "Hm."}, {"type": "output_text", "text": "It is "}, {"type": "text", "text": "four."},
    ]  # fmt: skip
    row = {"messages": [user([{"type": "input_text", "text": "What is 2 + 2?"}]), assistant(said)]}
    expected = {"messages": [user("What is 2 + 2?"), assistant("It is four.", reasoning_content="Hm.")]}
    assert masked("qwen3", row) == masked("qwen3", expected)
    assert bare_code({"messages": [user([{"type": "tool_use", "id": "x"}]), assistant("b")]}) == "bad_schema"


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
    *({"messages": PLAIN, "label": no} for no in (False, 0, "false", -1)),
    {"messages": PLAIN, "kto_tag": False},
    {"messages": PLAIN, "rejected": "It is five."},
    {"messages": PLAIN, "chosen": [assistant("Four.")]},
    {"messages": PLAIN, "loss_mask": 0},
    {"prompt": "a", "completion": "b", "label": 0},
]


@pytest.mark.parametrize("row", REFUSED_FLAGS, ids=str)
def test_m27_other_keys_that_decide_what_is_trained_are_refused(row: dict[str, Any]) -> None:
    """M27: never trained as if they were not there."""
    assert bare_code(row) == "bad_schema"


# --- M28: columns that belong to the prompt ---------------------------------------------------------------------------


def test_m28_columns_of_known_meaning_are_read() -> None:
    """M28: `functions`, `system_prompt`, `enable_thinking`, `history`."""
    plain = {"messages": PLAIN, "tools": [WEATHER_TOOL]}
    assert masked("qwen2_5", {"messages": PLAIN, "functions": [WEATHER_TOOL["function"]]}) == masked("qwen2_5", plain)
    assert bare({"messages": PLAIN, "system_prompt": "Be kind."}) == bare({"messages": [system("Be kind."), *PLAIN]})
    off = {"messages": PLAIN, "chat_template_kwargs": {"enable_thinking": False}}
    assert masked("qwen3", {"messages": PLAIN, "enable_thinking": False}) == masked("qwen3", off)
    told = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]}
    assert bare(told) == bare({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]})


@pytest.mark.parametrize(
    "columns",
    [{"context": "Paris is big."}, {"history": [["a", "b"]]}, {"prompt": "Something else"}, {"persona": "a pirate"}],
)
def test_m28_other_columns_of_a_prompt_are_refused_by_name_unless_ignored(columns: dict[str, Any]) -> None:
    """M28: an error that names the column, and `ignore_columns` for those meant to be ignored."""
    row = {"messages": PLAIN, **columns}
    assert bare_code(row) == "bad_schema"
    assert bare(row, ignore_columns=list(columns)) == bare({"messages": PLAIN})
    assert bare({"messages": PLAIN, **dict.fromkeys(columns)}) == bare({"messages": PLAIN})


def test_m28_a_variable_of_the_template_is_no_column_to_ignore() -> None:
    """M28: a column that has the name of what the template reads."""
    template = "{{ tone }}" + build_tokenizer("qwen").chat_template
    by = PromptMasker(build_tokenizer("qwen", chat_template=template))
    with pytest.raises(MaskingError, match="tone"):
        by.encode({"messages": PLAIN, "tone": "kind"})
    assert by.encode({"messages": PLAIN, "chat_template_kwargs": {"tone": "kind"}})


def test_m28_documents_are_in_the_prompt_or_the_row_is_refused() -> None:
    """M28: `documents` under a template that does not know them."""
    assert (
        code_of("llama3", {"messages": PLAIN, "documents": [{"title": "t", "text": "Paris is big."}]}) == "content_lost"
    )


# --- M30, M31, M32, M39 -----------------------------------------------------------------------------------------------


def test_m30_a_stream_gives_rows_of_one_schema() -> None:
    """M30: later rows bring a new column, and one of them is dropped."""

    def rows() -> Any:
        for i in range(600):
            extra = {"extra": i} if i > 300 else {}
            yield {"messages": [user("a")] if i == 400 else PLAIN, **extra}

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
    row = {"messages": PLAIN, "tools": [{"name": "f", "parameters": nested(depth)}]}
    by = PromptMasker(tokenizer_for_template("qwen3"))
    try:
        assert by.encode(row)
    except MaskingError as error:
        assert depth >= 100 and error.code in ("bad_schema", "template_error")  # noqa: PT017, PT018


def test_m31_names_that_are_numbers_are_rendered_or_refused() -> None:
    """M31: Python mappings may have them; JSON writes them as text."""
    row = {"messages": PLAIN, "tools": [{"name": "f", "parameters": {"properties": {1: {}, "b": {}}}}]}
    assert PromptMasker(tokenizer_for_template("qwen3")).encode(row)


DEEP = "[" * 2000 + "]" * 2000
BARE_EXCEPTIONS: list[dict[str, Any]] = [
    {"messages": PLAIN, "tools": ["name"]},
    {"conversations": [{"from": ["human"], "value": "a"}]},
    {"messages": PLAIN, "tools": DEEP},
    {"messages": DEEP},
    {"messages": [user("a"), assistant("", tool_calls=[call({})]), tool({"celsius": 21}), assistant("b")]},
    {"messages": [user("a"), assistant("", tool_calls=[call({})]), tool([1, 2]), assistant("b")]},
    {"messages": PLAIN, "chat_template_kwargs": {"tokenize": True}},
]


@pytest.mark.parametrize("row", BARE_EXCEPTIONS, ids=lambda row: str(row)[:60])
def test_m31_nothing_but_our_errors_leaves_the_masker(row: dict[str, Any]) -> None:
    """M31: TypeError, JSONDecodeError and RecursionError before."""
    assert bare_code(row) == "bad_schema"


def test_m31_json_text_is_read() -> None:
    """M31: `tools` as "null" or one schema, `chat_template_kwargs`, `tool_calls`."""
    plain = {"messages": PLAIN}
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
