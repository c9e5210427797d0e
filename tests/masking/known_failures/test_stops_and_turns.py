"""M26, M29, M33, M37, M39 of `docs/known-failures.md`: where an answer stops, and which turns become rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker
from testkit.conversations import BY_NAME, TemplateKnobs, assistant, user
from testkit.encoding import PRODUCT, encode, refusal, report_of, spans
from testkit.mask_oracle import decode
from testkit.tokenizers import build_tokenizer, stop_ids_for_template, template_names, tokenizer_for_template

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
    assert refusal(tokenizer, {"messages": PRODUCT}).code == "missing_stop"


def test_m37_stops_are_read_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M37: of a hub id, without a network; from a model at hand; and where nothing says, the error lists the candidates."""
    tokenizer, stops = tokenizer_for_template("glm4moe"), sorted(stop_ids_for_template("glm4moe"))
    tokenizer.name_or_path = "someone/glm"
    error = refusal(tokenizer, {"messages": PRODUCT})
    assert error.code == "missing_stop"
    assert f"{tokenizer.convert_tokens_to_ids('<|user|>')} '<|user|>'" in error.message
    config = GenerationConfig(eos_token_id=stops)
    for given in (config, SimpleNamespace(generation_config=config), stops):
        rows = PromptMasker(tokenizer, stop_token_ids=given).encode({"messages": PRODUCT})
        assert spans(tokenizer, rows)[0][1].endswith("42.<|user|>")
    _cache(tmp_path, "someone/glm", stops)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert PromptMasker(tokenizer).stop_token_ids == set(stops)


def test_m26_an_end_of_turn_at_which_generation_does_not_stop_is_told(tmp_path: Path) -> None:
    """M26: a base model's tokenizer, EOS `<|endoftext|>`, with ChatML; a generation config that names it settles it."""
    tokenizer = build_tokenizer("qwen", eos="<|endoftext|>")
    report = report_of(tokenizer, {"messages": PRODUCT})
    assert any("<|im_end|>" in note and "eos_token_id" in note for note in report.notes)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, end]).save_pretrained(tmp_path)
    tokenizer.name_or_path = str(tmp_path)
    assert report_of(tokenizer, {"messages": PRODUCT}).notes == []
    assert report_of(build_tokenizer("qwen"), {"messages": PRODUCT}).notes == []


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


def test_no_split_where_the_texts_part_right_behind_the_stop() -> None:
    """M9: another mark stands in the very place of the line's end that history has there."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
        "{{ '</s>' if loop.last and m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = build_tokenizer("qwen", chat_template=source, eos="<|im_end|>")
    rows = PromptMasker(tokenizer).encode({"messages": BY_NAME["many_turns"].row["messages"]})
    assert len(rows) == 1
    assert [text for _, text in spans(tokenizer, rows)][-1] == "Bye!<|im_end|>"


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
