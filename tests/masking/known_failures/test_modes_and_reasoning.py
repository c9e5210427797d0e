"""M34–M36 of `docs/known-failures.md`: a row whatever the template makes of reasoning, and counted what was done for it."""

from __future__ import annotations

from typing import Any

import pytest

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker
from testkit.conversations import TemplateKnobs, assistant, call, system, tool, user
from testkit.encoding import PRODUCT, encode, refusal, report_of, spans
from testkit.tokenizers import build_tokenizer, tokenizer_for_template

REASONED = [user("What is 6 * 7?"), assistant("42.", reasoning_content="Six times seven.")]


INLINE = [user("What is 6 * 7?"), assistant("<think>\nSix times seven.\n</think>\n\n42.")]


# --- modes ------------------------------------------------------------------------------------------------------------


def test_m34_a_turn_belongs_to_the_mode_whose_prompt_it_goes_on_from() -> None:
    """M34: Nemotron-3 opens a thought by default; a turn without reasoning is the non-thinking mode's row."""
    tokenizer, rows = encode("nemotron_3_nano", [*REASONED, *PRODUCT])
    assert [text for _, text in spans(tokenizer, rows)] == [
        "Six times seven.\n</think>\n42.<|im_end|>",
        "42.<|im_end|>",
    ]
    assert [before.rpartition("\n<think>")[2] for before, _ in spans(tokenizer, rows)] == ["\n", "</think>"]
    report = report_of(tokenizer, {"messages": [*REASONED, *PRODUCT]})
    assert report.modes == {"default": 1, "enable_thinking=False": 1}
    assert "turns by mode" in str(report)


def test_m34_of_several_modes_the_one_that_supplies_most_of_the_turn_is_taken() -> None:
    """M34: Qwen 3 renders an empty block either way; it is the prompt's, and closing it at once is not trained."""
    tokenizer, rows = encode("qwen3", PRODUCT)
    ((before, text),) = spans(tokenizer, rows)
    assert before.endswith("assistant\n<think>\n\n</think>\n\n")
    assert text == "42.<|im_end|>"
    tokenizer, rows = encode("qwen3", REASONED)
    assert spans(tokenizer, rows)[0][1].startswith("<think>\nSix times seven.")


def test_m34_the_users_own_switch_decides_alone() -> None:
    """M34: `chat_template_kwargs` of the row, or thinking="default", leave one mode."""
    tokenizer = tokenizer_for_template("nemotron_3_nano")
    row = {"messages": PRODUCT, "chat_template_kwargs": {"enable_thinking": True}}
    assert refusal(tokenizer, row).code == "render_mismatch"
    assert refusal(tokenizer, {"messages": PRODUCT}, thinking="default").code == "render_mismatch"
    assert report_of(tokenizer, {**row, "chat_template_kwargs": {"enable_thinking": False}}).rows_out == 1
    with pytest.raises(MaskingError, match="'auto'"):
        PromptMasker(tokenizer, thinking="on")


# --- continuation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
@pytest.mark.parametrize("messages", [REASONED, INLINE], ids=["key", "inline"])
def test_m35_a_template_that_strips_the_turns_own_reasoning_is_continued(name: str, messages: list[Any]) -> None:
    """M35: the prompt's ids, then the message's own text, its opening tag left out where the prompt supplied it."""
    tokenizer, rows = encode(name, [system("Be brief."), *messages])
    ((before, text),) = spans(tokenizer, rows)
    assert before.endswith("<｜Assistant｜><think>\n")
    assert text == "Six times seven.\n</think>\n\n42.<｜end▁of▁sentence｜>"
    report = report_of(tokenizer, {"messages": messages})
    assert report.changes == {"continued": 1}
    assert "continued" in str(report)


@pytest.mark.parametrize("answer", ["<b>42</b>", "</p>"])
def test_m35_an_answer_may_begin_as_the_prompts_tag_does(answer: str) -> None:
    """M35: prompt and rendering part in the middle of `<think>`, which is the prompt's all the same."""
    messages = [user("Bold, please."), assistant(answer, reasoning_content="Tags.")]
    tokenizer, rows = encode("deepseek_r1_distill", messages)
    assert [text for _, text in spans(tokenizer, rows)] == [f"Tags.\n</think>\n\n{answer}<｜end▁of▁sentence｜>"]


TWO_ANSWERS = [user("Hello"), assistant("First."), assistant("Second.")]


LOOKED_UP = [
    user("Paris?"),
    assistant("", thinking="Look it up.", tool_calls=[call({"city": "Paris"})]),
    tool("21 degrees"),
    assistant("21 degrees.", thinking="The tool says 21."),
]


@pytest.mark.parametrize(
    ("name", "messages", "before", "text"),
    [
        ("qwen3", TWO_ANSWERS, "<think>\n\n</think>\n\n", "Second.<|im_end|>"),
        ("gemma4", TWO_ANSWERS, "First.<turn|>\n<|turn>model\n", "Second.<turn|>"),
        ("gemma4_v5", TWO_ANSWERS, "First.<turn|>\n<|turn>model\n", "Second.<turn|>"),
        (
            "gemma4",
            [user("Paris?"), assistant("Let me see."), assistant("", tool_calls=[call({"city": "Paris"})])],
            "Let me see.<turn|>\n<|turn>model\n",
            '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|><|tool_response>',
        ),
        (
            "gptoss",
            LOOKED_UP,
            '"21 degrees"<|end|><|start|>assistant',
            "<|channel|>analysis<|message|>The tool says 21.<|end|><|start|>assistant<|channel|>final<|message|>21 degrees."
            "<|return|>",
        ),
    ],
)
def test_m35_a_turn_behind_a_rewritten_history_goes_on_from_the_prompt(
    name: str, messages: list[Any], before: str, text: str
) -> None:
    """M35: the template writes the turns before it otherwise once it is there; its own part stands behind them."""
    tokenizer, rows = encode(name, messages)
    prompt, trained = spans(tokenizer, rows)[-1]
    assert prompt.endswith(before[-40:])
    assert trained == text
    assert report_of(tokenizer, {"messages": messages}).changes["continued"] == 1


def test_a_prompt_that_parts_from_the_rendering_behind_a_question_is_refused_still() -> None:
    """M10: another header in the prompt than in the rendering is the template's fault, not history."""
    tokenizer = build_tokenizer("qwen")
    for prompt in ("<|im_start|>model\n", "<|im_start|>assistant\n\n"):
        tokenizer.chat_template = (
            TemplateKnobs().jinja().replace("'<|im_start|>assistant\\n' }}{%", f"{prompt!r} }}}}{{%")
        )
        assert tokenizer.chat_template != TemplateKnobs().jinja()
        assert refusal(tokenizer, {"messages": PRODUCT}).code == "render_mismatch"


def test_m35_a_turn_without_reasoning_under_an_open_thought_says_why_it_is_refused() -> None:
    """M35: no switch of R1's closes the thought; to train its end at once would teach not to think."""
    error = refusal(tokenizer_for_template("deepseek_r1_distill"), {"messages": PRODUCT})
    assert error.code == "render_mismatch"
    assert "has no reasoning" in error.message
    assert "chat_template" in (error.remedy or "")


# --- reasoning that the template does not know ------------------------------------------------------------------------


def test_m36_reasoning_is_raised_inlined_or_dropped_as_asked() -> None:
    """M36: Llama 3 knows no reasoning; the error names the two ways, and each is counted."""
    tokenizer = tokenizer_for_template("llama3")
    error = refusal(tokenizer, {"messages": REASONED})
    assert error.code == "content_lost"
    assert "inline" in (error.remedy or "")
    assert "drop" in (error.remedy or "")
    kept = PromptMasker(tokenizer, reasoning="inline").encode({"messages": REASONED})
    assert [text for _, text in spans(tokenizer, kept)] == ["<think>\nSix times seven.\n</think>\n\n42.<|eot_id|>"]
    bare = PromptMasker(tokenizer, reasoning="drop").encode({"messages": REASONED})
    assert [text for _, text in spans(tokenizer, bare)] == ["42.<|eot_id|>"]
    assert report_of(tokenizer, {"messages": REASONED}, reasoning="inline").changes == {"reasoning_inlined": 1}
    assert report_of(tokenizer, {"messages": REASONED}, reasoning="drop").changes == {"reasoning_dropped": 1}


def test_m36_reasoning_under_a_key_that_the_template_does_not_look_up_is_told_the_one_that_it_does() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning %}<think>{{ m.reasoning }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = build_tokenizer("qwen", chat_template=template)
    assert "under the key 'reasoning'" in (refusal(tokenizer, {"messages": REASONED}).remedy or "")
    renamed = [
        {{"reasoning_content": "reasoning"}.get(key, key): text for key, text in one.items()} for one in REASONED
    ]
    assert "Six times seven." in spans(tokenizer, PromptMasker(tokenizer).encode({"messages": renamed}))[0][1]


@pytest.mark.parametrize(("thought", "answer"), [("42", "It is 42."), ("t", "a")])
def test_m36_a_thought_that_stands_in_the_answer_as_well_is_no_rendered_one(thought: str, answer: str) -> None:
    """M36: Llama 3 leaves it out all the same, though the turn holds its text ("t" is in `<|eot_id|>`)."""
    tokenizer = tokenizer_for_template("llama3")
    row = {"messages": [user("6 * 7?"), assistant(answer, reasoning_content=thought)]}
    (made,) = PromptMasker(tokenizer, reasoning="inline").encode(row)
    ((_, text),) = spans(tokenizer, [made])
    assert text == f"<think>\n{thought}\n</think>\n\n{answer}<|eot_id|>"
    assert report_of(tokenizer, row, reasoning="drop").changes == {"reasoning_dropped": 1}
    assert 'reasoning="inline"' in (refusal(tokenizer, row).remedy or "")


def test_m36_a_template_that_renders_reasoning_is_left_alone() -> None:
    """M36: the option is for templates that know none."""
    for option in ("inline", "drop"):
        tokenizer, rows = encode("qwen3", REASONED, reasoning=option)
        assert "Six times seven." in spans(tokenizer, rows)[0][1]
        assert not any(rows[0].changes)


def test_m36_an_answer_that_is_reasoning_alone_is_empty_without_it() -> None:
    """M36: dropping it leaves nothing, and that is told as such."""
    row = {"messages": [user("Hm?"), assistant("", reasoning_content="Hm.")]}
    assert refusal(tokenizer_for_template("llama3"), row, reasoning="drop").code == "empty_response"
