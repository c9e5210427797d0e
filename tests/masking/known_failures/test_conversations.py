"""M23–M25, M38 of `docs/known-failures.md`: the whole conversation is in what is trained, or the row is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, mask_dataset
from testkit.conversations import WEATHER_TOOL, assistant, call, parts, tool, user
from testkit.encoding import SUM, bare_code, encode_one, masked, refusal_code, supervised_text
from testkit.tokenizers import build_tokenizer, tokenizer_for_template

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
    "developer role": ("gemma3", {"messages": [{"role": "developer", "content": "Be brief."}, *SUM]}),
    "tools": ("llama3", {"messages": SUM, "tools": [WEATHER_TOOL]}),
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
    code = refusal_code(template, row)
    assert code in ("content_lost", "template_error")
    made = mask_dataset(
        Dataset.from_list([row, {"messages": SUM}]), PromptMasker(tokenizer_for_template(template), errors="drop")
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


def test_m24_a_template_may_write_the_name_of_a_tool_beside_its_result() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' ~ m.name if m.name else '' }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = build_tokenizer("qwen", chat_template=source)
    asked = [user("Oslo?"), assistant("", tool_calls=[call({"city": "Oslo"})]), tool("21"), assistant("Mild.")]
    row = encode_one(tokenizer, {"messages": asked})
    assert supervised_text(tokenizer, row) == ['get_weather{"city": "Oslo"}<|im_end|>', "Mild.<|im_end|>"]


def test_m24_a_prompt_may_end_with_the_very_text_of_the_question() -> None:
    """M24: no header of an answer stands behind it, as in the templates of plain completion."""
    source = "{% for m in messages %}{{ m.content }}{{ '</s>' if m.role == 'assistant' else '' }}{% endfor %}"
    tokenizer = build_tokenizer("qwen", chat_template=source, eos="</s>")
    row = encode_one(tokenizer, {"messages": [user("One?\nA:"), assistant("Yes."), user("Two?\nA:"), assistant("No.")]})
    assert supervised_text(tokenizer, row) == ["Yes.</s>", "No.</s>"]


def test_m24_a_template_that_looks_at_the_text_is_followed() -> None:
    """M24: the shape of a conversation proves nothing where the text itself decides; then the row is looked at."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ '[cut]' if 'secret' in m.content and m.role == 'user' else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    by = PromptMasker(build_tokenizer("qwen", chat_template=template))
    assert by.encode({"messages": SUM})
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
