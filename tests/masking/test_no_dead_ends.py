"""M26, M29, M33–M37, M39: a well-formed conversation is a row, and what was done for that is counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import GenerationConfig

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, mask_dataset
from testkit import mask_oracle
from testkit.conversations import BY_NAME, TemplateKnobs, assistant, call, system, tool, user
from testkit.mask_oracle import decode, runs
from testkit.tokenizers import build_tokenizer, stop_ids_for_template, template_names, tokenizer_for_template


def spans(tokenizer: Any, rows: list[Any]) -> list[tuple[str, str]]:
    """(the last 40 characters before, the text) of every supervised run."""
    return [
        (decode(tokenizer, row.input_ids[:a])[-40:], decode(tokenizer, row.input_ids[a:b]))
        for row in rows
        for a, b in runs(row.labels)
    ]


def encode(name: str, messages: list[dict[str, Any]], **options: Any) -> tuple[Any, list[Any]]:
    """The rows under template `name`, held to the oracle."""
    tokenizer = tokenizer_for_template(name)
    rows = PromptMasker(tokenizer, **options).encode({"messages": messages})
    faults = mask_oracle.violations(tokenizer, {"messages": messages}, rows, stop_ids=stop_ids_for_template(name))
    assert faults == []
    return tokenizer, rows


def refusal(tokenizer: Any, row: dict[str, Any], **options: Any) -> MaskingError:
    with pytest.raises(MaskingError) as caught:
        PromptMasker(tokenizer, **options).encode(row)
    assert caught.value.remedy
    return caught.value


def report_of(tokenizer: Any, *rows: dict[str, Any], **options: Any) -> Any:
    return mask_dataset(Dataset.from_list(list(rows)), PromptMasker(tokenizer, **options)).report


PLAIN = [user("What is 6 * 7?"), assistant("42.")]
REASONED = [user("What is 6 * 7?"), assistant("42.", reasoning_content="Six times seven.")]
INLINE = [user("What is 6 * 7?"), assistant("<think>\nSix times seven.\n</think>\n\n42.")]


# --- modes ------------------------------------------------------------------------------------------------------------


def test_m34_a_turn_belongs_to_the_mode_whose_prompt_it_goes_on_from() -> None:
    """M34: Nemotron-3 opens a thought by default; a turn without reasoning is the non-thinking mode's row."""
    tokenizer, rows = encode("nemotron_3_nano", [*REASONED, *PLAIN])
    assert [text for _, text in spans(tokenizer, rows)] == [
        "Six times seven.\n</think>\n42.<|im_end|>",
        "42.<|im_end|>",
    ]
    assert [before.rpartition("\n<think>")[2] for before, _ in spans(tokenizer, rows)] == ["\n", "</think>"]
    report = report_of(tokenizer, {"messages": [*REASONED, *PLAIN]})
    assert report.modes == {"default": 1, "enable_thinking=False": 1}
    assert "turns by mode" in str(report)


def test_m34_of_several_modes_the_one_that_supplies_most_of_the_turn_is_taken() -> None:
    """M34: Qwen 3 renders an empty block either way; it is the prompt's, and closing it at once is not trained."""
    tokenizer, rows = encode("qwen3", PLAIN)
    ((before, text),) = spans(tokenizer, rows)
    assert before.endswith("assistant\n<think>\n\n</think>\n\n")
    assert text == "42.<|im_end|>"
    tokenizer, rows = encode("qwen3", REASONED)
    assert spans(tokenizer, rows)[0][1].startswith("<think>\nSix times seven.")


def test_m34_the_users_own_switch_decides_alone() -> None:
    """M34: `chat_template_kwargs` of the row, or thinking="default", leave one mode."""
    tokenizer = tokenizer_for_template("nemotron_3_nano")
    row = {"messages": PLAIN, "chat_template_kwargs": {"enable_thinking": True}}
    assert refusal(tokenizer, row).code == "render_mismatch"
    assert refusal(tokenizer, {"messages": PLAIN}, thinking="default").code == "render_mismatch"
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
        assert refusal(tokenizer, {"messages": PLAIN}).code == "render_mismatch"


def test_m35_a_turn_without_reasoning_under_an_open_thought_says_why_it_is_refused() -> None:
    """M35: no switch of R1's closes the thought; to train its end at once would teach not to think."""
    error = refusal(tokenizer_for_template("deepseek_r1_distill"), {"messages": PLAIN})
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


# --- stops ------------------------------------------------------------------------------------------------------------


def test_m37_a_stop_that_the_next_header_brings_ends_the_last_turn_too() -> None:
    """M37: GLM's turns end with the next header; its generation config says that generation stops there."""
    tokenizer, rows = encode("glm4moe", BY_NAME["many_turns"].row["messages"])
    assert all(text.endswith("<|user|>") for _, text in spans(tokenizer, rows))


def _cache(folder: Path, repository: str, eos: list[int]) -> None:
    """The hub's cache with the generation config of `repository` in it."""
    home = folder / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    GenerationConfig(eos_token_id=eos).save_pretrained(home / "snapshots" / ("0" * 40))


def test_m37_a_template_that_ends_all_turns_but_the_last_ends_the_last_one_nowhere() -> None:
    """M37: what stands between two turns is no header that follows the last: "42.\\n<|im_end|>" is in no rendering."""
    tokenizer = build_tokenizer("qwen")
    tokenizer.chat_template = TemplateKnobs(terminator="not_last").jinja()
    assert refusal(tokenizer, {"messages": PLAIN}).code == "missing_stop"


def test_m37_stops_are_read_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M37: of a hub id, without a network; from a model at hand; and where nothing says, the error lists the candidates."""
    tokenizer, stops = tokenizer_for_template("glm4moe"), sorted(stop_ids_for_template("glm4moe"))
    tokenizer.name_or_path = "someone/glm"
    error = refusal(tokenizer, {"messages": PLAIN})
    assert error.code == "missing_stop"
    assert f"{tokenizer.convert_tokens_to_ids('<|user|>')} '<|user|>'" in error.message
    config = GenerationConfig(eos_token_id=stops)
    for given in (config, SimpleNamespace(generation_config=config), stops):
        rows = PromptMasker(tokenizer, stop_token_ids=given).encode({"messages": PLAIN})
        assert spans(tokenizer, rows)[0][1].endswith("42.<|user|>")
    _cache(tmp_path, "someone/glm", stops)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert PromptMasker(tokenizer).stop_token_ids == set(stops)


def test_m26_an_end_of_turn_at_which_generation_does_not_stop_is_told(tmp_path: Path) -> None:
    """M26: a base model's tokenizer, EOS `<|endoftext|>`, with ChatML; a generation config that names it settles it."""
    tokenizer = build_tokenizer("qwen", eos="<|endoftext|>")
    report = report_of(tokenizer, {"messages": PLAIN})
    assert any("<|im_end|>" in note and "eos_token_id" in note for note in report.notes)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, end]).save_pretrained(tmp_path)
    tokenizer.name_or_path = str(tmp_path)
    assert report_of(tokenizer, {"messages": PLAIN}).notes == []
    assert report_of(build_tokenizer("qwen"), {"messages": PLAIN}).notes == []


@pytest.mark.parametrize(
    "response", ["yes<|im_end|>\n", "yes<|im_end|>", "yes<|im_end|><|im_end|>", "yes<|im_end|> <|im_end|>\n"]
)
def test_m29_nothing_after_the_first_stop_behind_the_text_carries_loss(response: str) -> None:
    """M29: with special tokens allowed, a completion that ends itself ends there."""
    tokenizer = build_tokenizer("qwen")
    rows = PromptMasker(tokenizer, special_tokens_in_content="allow").encode(
        {"prompt": "Well? ", "completion": response}
    )
    assert [text for _, text in spans(tokenizer, rows)] == ["yes<|im_end|>"]
    assert rows[0].input_ids[-1] == tokenizer.eos_token_id


def test_m29_a_stop_inside_the_text_is_part_of_it() -> None:
    """M29: what comes behind it is text, and is ended by a stop of its own."""
    tokenizer = build_tokenizer("qwen")
    rows = PromptMasker(tokenizer, special_tokens_in_content="allow").encode(
        {"prompt": "Q ", "completion": "a<|im_end|>b\n"}
    )
    assert [text for _, text in spans(tokenizer, rows)] == ["a<|im_end|>b\n<|im_end|>"]


def test_a_stop_is_behind_all_of_the_turn_not_behind_a_part_that_reads_like_it() -> None:
    """M29: a thought that ends on a stop of its own and holds the answer's words ("That is 42.") does not end the turn."""
    if "muse_glimmer" not in template_names():
        pytest.skip("this TRL has no muse_glimmer")
    messages = [user("6 * 7?"), assistant("42.", reasoning_content="That is 42.")]
    tokenizer, rows = encode("muse_glimmer", messages)
    assert spans(tokenizer, rows)[0][1].endswith("<|message|>42.<|eot|>")


# --- turns and rows ---------------------------------------------------------------------------------------------------

_BARE = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"


def test_m33_keep_turns_counts_turns_not_runs_of_labels() -> None:
    """M33: under a template without headers two answers touch; the first fits, and is kept."""
    tokenizer = build_tokenizer("qwen", chat_template=_BARE)
    row = {"messages": [user("Hi"), assistant("one"), assistant("two and many more words than fit")]}
    (whole,) = PromptMasker(tokenizer).encode(row)
    first = whole.turn_ends[0]
    (made,) = PromptMasker(tokenizer, max_length=first + 2, overflow="keep_turns").encode(row)
    assert made.input_ids == whole.input_ids[:first]
    assert made.labels == whole.labels[:first]
    assert (made.lost_tokens, made.lost_supervised) == (len(whole.input_ids) - first, len(whole.input_ids) - first)


@pytest.mark.parametrize("name", ["phi3", "phi3_5"])
def test_no_split_where_only_what_follows_the_last_stop_differs(name: str) -> None:
    """M9: Phi-3 writes its EOS behind the last turn alone, behind the stop token: that rewrites no history."""
    tokenizer, rows = encode(name, BY_NAME["many_turns"].row["messages"])
    assert len(rows) == 1
    assert [text for _, text in spans(tokenizer, rows)][-1] == "Bye!<|end|>"
    assert len(spans(tokenizer, rows)) == 4
    assert encode(name, BY_NAME["many_turns"].row["messages"], on_history_rewrite="raise")[1] == rows


def test_m39_a_greeting_is_context() -> None:
    """M39: nothing prompts the first message; the turns after it are trained, and the greeting is counted."""
    messages = [assistant("Hello, how can I help?"), user("Bye"), assistant("Bye.")]
    tokenizer, rows = encode("qwen2_5", messages)
    assert [text for _, text in spans(tokenizer, rows)] == ["Bye.<|im_end|>"]
    assert "how can I help?" in decode(tokenizer, rows[0].input_ids)
    assert report_of(tokenizer, {"messages": messages}).changes == {"greeting_untrained": 1}
    assert refusal(tokenizer, {"messages": messages[:1]}).code == "no_prompt"
    assert refusal(tokenizer_for_template("gemma"), {"messages": messages}).code == "template_error"


def test_m39_special_tokens_that_are_words_are_allowed_by_name() -> None:
    """M39: the default refuses both and asks for a decision where a token begins and ends no turn."""
    tokenizer = build_tokenizer("qwen", special_tokens=("<|im_start|>", "<|im_end|>", "<filename>"))
    word, forged = (
        {"messages": [user(f"Open {token}"), assistant("Done.")]} for token in ("<filename>", "<|im_start|>")
    )
    assert "special_tokens_in_content=[that token]" in (refusal(tokenizer, word).remedy or "")
    assert "forge" in (refusal(tokenizer, forged).remedy or "")
    named = PromptMasker(tokenizer, special_tokens_in_content=["<filename>"])
    assert tokenizer.convert_tokens_to_ids("<filename>") in named.encode(word)[0].input_ids
    assert refusal(tokenizer, forged, special_tokens_in_content=["<filename>"]).code == "special_token_in_content"
    with pytest.raises(MaskingError, match="<file_name>") as caught:
        PromptMasker(tokenizer, special_tokens_in_content=["<file_name>"])
    assert caught.value.code == "bad_option"
