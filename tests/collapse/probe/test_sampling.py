"""Prompts become what generation would be given, and answers depend on the model and the seed only (C5)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from sft_plugins._preserve import untouched
from sft_plugins.collapse.probe.prompts import Prompt, encode_prompts, load_prompts
from sft_plugins.collapse.probe.sampling import (
    generation_config,
    model_context,
    plan_batches,
    sample_batch,
    stop_token_ids,
)
from sft_plugins.errors import CollapseError
from sft_plugins.masking import PromptMasker
from testkit.tokenizers import build_tokenizer, dump
from testkit.watched_runs import byte_tokenizer, lora, tiny_model

CPU = torch.device("cpu")


def answers(
    model: Any, tokenizer: Any, prompts: tuple[Prompt, ...], *, k: int = 2, new: int = 8, seed: int = 0, **plan: Any
) -> list[Any]:
    encoded = encode_prompts(prompts, PromptMasker(tokenizer), max_new_tokens=new, context=model_context(model.config))
    config = generation_config(max_new_tokens=new, stop_ids=stop_token_ids(PromptMasker(tokenizer), model), pad_id=0)
    batches = plan_batches(encoded, k, max_new_tokens=new, config=model.config, seed=seed, **plan)
    with untouched(model, tokenizer):
        return [s for b in batches for s in sample_batch(model, b, encoded, tokenizer, config=config, device=CPU)]


def test_the_built_in_prompts_are_many_open_and_some_closed() -> None:
    prompts = load_prompts()
    tags = [p.tag for p in prompts]
    assert (tags.count("open"), tags.count("closed")) == (32, 8)
    assert prompts == load_prompts("builtin")


def test_prompts_come_from_lists_files_and_datasets(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "A?", "tag": "open"}, {"prompt": "B?", "tag": "closed"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    expected = load_prompts(rows)
    assert [(p.text, p.tag) for p in expected] == [("A?", "open"), ("B?", "closed")]
    assert load_prompts(file) == expected
    assert load_prompts(datasets.Dataset.from_list(rows)) == expected
    assert load_prompts(["A?"])[0].tag == "open"


@pytest.mark.parametrize(
    ("source", "code", "row", "words"),
    [
        ([], "no_prompts", None, "no prompts"),
        (["A?", ""], "bad_prompt", 1, "empty"),
        ([{"prompt": "A?", "tag": "opne"}], "bad_prompt", 0, "allowed: open, closed"),
        ([{"text": "A?"}], "bad_prompt", 0, "'prompt' or 'messages'"),
        (["A?", 7], "bad_prompt", 1, "got int"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "bad_prompt", 0, "ends with an answer"),
        ([{"messages": "A?"}], "bad_prompt", 0, "not a list of messages"),
        ([{"messages": 7}], "bad_prompt", 0, "not a list of messages"),
        ([{"messages": []}], "bad_prompt", 0, "empty"),
        ([{"messages": [{"role": "user", "content": " "}]}], "bad_prompt", 0, "empty"),
        ([{"messages": [{"role": "user", "content": "A?"}, "B?"]}], "bad_prompt", 0, "not a list of messages"),
        ([{"messages": [{"role": "user", "content": "A?"}, {"content": "B?"}]}], "bad_prompt", 0, "not a list of"),
        ([{"messages": [{"role": "user", "content": ["A?"]}]}], "bad_prompt", 0, "not a list of messages"),
        ([{"prompt": "A?", "messages": [{"role": "user", "content": "A?"}]}], "bad_prompt", 0, "either 'prompt' or"),
        ([{"tag": "open"}], "bad_prompt", 0, "either 'prompt' or"),
        (["A?", "B?", "A?"], "duplicate_prompt", 2, "same as prompt 0"),
        (
            [{"messages": [{"role": "user", "content": "A?"}]}, {"messages": [{"content": "A?", "role": "user"}]}],
            "duplicate_prompt",
            1,
            "same as prompt 0",
        ),
        ("no/such/file.jsonl", "prompt_file", None, "cannot read prompts"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(source: Any, code: str, row: int | None, words: str) -> None:
    with pytest.raises(CollapseError, match=words) as caught:
        load_prompts(source)
    assert (caught.value.code, caught.value.row) == (code, row)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b'{"prompt": "A?"}\n{"prompt": "B?"\n', "bad_prompt", "line 2 of .*prompts.jsonl is not JSON"),
        ('{"prompt": "A?"}\n'.encode("utf-16"), "prompt_file", "cannot read prompts from .*prompts.jsonl"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_is_named(content: bytes, code: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    with pytest.raises(CollapseError, match=words) as caught:
        load_prompts(tmp_path / "prompts.jsonl")
    assert caught.value.code == code
    assert caught.value.remedy


def test_a_line_ends_where_the_file_says_not_inside_a_prompt(tmp_path: Path) -> None:
    """U+2028 is a character of a JSON string, though it ends a line for `str.splitlines`."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "A\u2028B"}\r\n', encoding="utf-8", newline="")
    assert [prompt.text for prompt in load_prompts(tmp_path / "prompts.jsonl")] == ["A\u2028B"]


def test_a_prompt_is_what_generation_would_be_given() -> None:
    tokenizer = byte_tokenizer()
    prompt = load_prompts(["Hé?"])
    expected = tokenizer.apply_chat_template(
        list(prompt[0].messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert encode_prompts(prompt, PromptMasker(tokenizer), max_new_tokens=4, context=None) == [expected]


@pytest.mark.parametrize("in_template", [False, True])
def test_prompts_carry_bos_at_most_once(in_template: bool) -> None:
    """C5: a template that writes BOS and a tokenizer that adds it make one, not two."""
    template = "{{ bos_token }}{{ messages[0]['content'] }}" if in_template else None
    tokenizer = build_tokenizer("llama3", chat_template=template)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id, "this tokenizer must add BOS"
    (ids,) = encode_prompts(load_prompts(["Hello"]), PromptMasker(tokenizer), max_new_tokens=4, context=None)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_a_prompt_that_does_not_fit_the_context_is_refused() -> None:
    with pytest.raises(CollapseError, match="shorten the prompt or lower max_new_tokens") as caught:
        encode_prompts(load_prompts(["A?", "B" * 300]), PromptMasker(byte_tokenizer()), max_new_tokens=8, context=256)
    assert (caught.value.code, caught.value.row) == ("prompt_too_long", 1)


def test_stop_tokens_are_eos_and_the_templates_end_of_turn() -> None:
    tokenizer, model = byte_tokenizer(), tiny_model()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(PromptMasker(tokenizer), model) == (tokenizer.eos_token_id, end)
    model.generation_config.eos_token_id = [9, 2]
    assert stop_token_ids(PromptMasker(tokenizer), model) == (2, end, 9)


def test_every_answer_ends_at_its_stop_token_or_is_marked_cut() -> None:
    tokenizer, model = byte_tokenizer(), tiny_model()
    stops = set(stop_token_ids(PromptMasker(tokenizer), model))
    found = answers(model, tokenizer, load_prompts(["A?", "Bb?"]), k=24, new=60)
    for sample in found:
        inside = [t in stops for t in sample.token_ids]
        assert not any(inside[:-1])
        assert sample.truncated is not inside[-1]
        assert len(sample.token_ids) == 60 or not sample.truncated
    assert {s.truncated for s in found} == {True, False}


def test_left_padding_does_not_change_an_answer_and_the_tokenizer_does_not_pad() -> None:
    """C5: greedy at temperature 0 would hide it, so the same seed samples a prompt alone and beside a longer one."""
    tokenizer, model = byte_tokenizer(), tiny_model()
    before = dump(tokenizer)
    short = load_prompts(["A?"])
    both = load_prompts(["A?", "A much longer prompt than the other one?"])
    alone = answers(model, tokenizer, short, k=1, new=1)
    beside = answers(model, tokenizer, both, k=1, new=1)
    assert alone[0].token_ids == beside[0].token_ids
    assert dump(tokenizer) == before

    ids = encode_prompts(both, PromptMasker(tokenizer), max_new_tokens=1, context=None)
    pad = len(ids[1]) - len(ids[0])
    with torch.no_grad():
        plain = model.eval()(torch.tensor(ids[:1])).logits[0, -1]
        padded = model(
            torch.tensor([[0] * pad + ids[0]]), attention_mask=torch.tensor([[0] * pad + [1] * len(ids[0])]),
            position_ids=torch.tensor([[0] * pad + list(range(len(ids[0])))]),
        ).logits[0, -1]  # fmt: skip
    assert torch.allclose(plain, padded, atol=1e-5)


def test_answers_depend_on_the_seed_and_not_on_the_state_around() -> None:
    tokenizer, model = byte_tokenizer(), tiny_model(dropout=0.5).train()
    prompts = load_prompts(["A?", "B?"])
    torch.manual_seed(0)
    first = answers(model, tokenizer, prompts)
    torch.manual_seed(99)
    assert answers(model, tokenizer, prompts) == first, "dropout or the global generator came through (C5)"
    assert answers(model, tokenizer, prompts, seed=1) != first
    assert len({s.seed for s in answers(model, tokenizer, prompts, max_rows=1)}) == 4


def test_the_models_own_generation_configuration_has_no_say() -> None:
    tokenizer, model = byte_tokenizer(), tiny_model()
    prompts = load_prompts(["A?", "B?"])
    plain = answers(model, tokenizer, prompts, k=4)
    own = model.generation_config
    own.temperature, own.top_k, own.top_p, own.repetition_penalty, own.min_p = 0.1, 1, 0.1, 3.0, 0.9
    own.suppress_tokens, own.do_sample, own.max_length, own.no_repeat_ngram_size = [7, 8], False, 3, 1
    assert answers(model, tokenizer, prompts, k=4) == plain
    assert model.generation_config is own
    assert own.top_k == 1


def test_the_models_own_generation_configuration_is_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = byte_tokenizer(), tiny_model()
    own = model.generation_config

    def broken(*_: Any, **__: Any) -> Any:
        assert model.generation_config is not own
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        answers(model, tokenizer, load_prompts(["A?"]))
    assert model.generation_config is own


def test_sampling_is_from_the_models_own_distribution() -> None:
    """Temperature 1, nothing cut off: the frequencies of first tokens are the softmax of the logits."""
    tokenizer, model = byte_tokenizer(), tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= 30
    prompts = load_prompts(["A?"])
    encoded = encode_prompts(prompts, PromptMasker(tokenizer), max_new_tokens=1, context=None)
    with torch.no_grad():
        p = model.eval()(torch.tensor(encoded)).logits[0, -1].softmax(-1)
    drawn = answers(model, tokenizer, prompts, k=4000, new=1)
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in drawn]), minlength=261)
    # Total variation of 4000 draws from itself is about Σ √(p(1−p)/(2π·4000)); three times that.
    bound = 3 * float((p * (1 - p) / (2 * torch.pi * 4000)).sqrt().sum())
    assert 0.5 * float((counts / 4000 - p).abs().sum()) < bound
    assert 0.5 * float((p**2 / (p**2).sum() - p).abs().sum()) > 1.5 * bound, "a sharper one must be told apart"


def test_a_batch_stays_within_memory_and_every_sample_is_drawn_once() -> None:
    encoded = [[1] * n for n in (3, 9, 4)]
    config = tiny_model().config
    one = plan_batches(encoded, 4, max_new_tokens=8, config=config, seed=0)
    assert [len(b.rows) for b in one] == [12]
    row = 2 * 2 * 2 * 8 * 4 * (9 + 8) + 16 * 261  # keys and values, layers, heads, width, bytes, length; logits
    small = plan_batches(encoded, 4, max_new_tokens=8, config=config, seed=0, max_bytes=5 * row)
    assert [len(b.rows) for b in small] == [5, 5, 2]
    rows = [r for b in small for r in b.rows]
    assert sorted(rows) == [(p, k) for p in range(3) for k in range(4)]
    assert [p for p, _ in rows] == [0] * 4 + [2] * 4 + [1] * 4  # by length
    assert plan_batches(encoded, 4, max_new_tokens=8, config=config, seed=0, max_bytes=1)[-1].id == 11


def test_the_cache_is_used_under_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation mode alone gives the cache back; the checkpointing flags are not touched."""
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    flags = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
    widths: list[int] = []
    caches: list[Any] = []
    own = model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[1])
        caches.append(kwargs.get("cache", kwargs.get("past_key_values")))  # the first since transformers 5.24
        return own(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    answers(model, byte_tokenizer(), load_prompts(["A?"]), new=5)
    assert widths[1:] == [1] * (len(widths) - 1), "every step after the first reads one token"
    assert len(widths) > 2
    assert all(isinstance(cache, DynamicCache) for cache in caches)
    assert [getattr(m, "gradient_checkpointing", None) for m in model.modules()] == flags
    assert model.config.use_cache is False


@pytest.mark.parametrize("pad", [True, False])
def test_a_tokenizer_without_pad_token_answers_the_same(pad: bool) -> None:
    tokenizer, model = byte_tokenizer(pad=pad), tiny_model()
    if not pad:
        assert tokenizer.pad_token_id is None
    found = answers(model, tokenizer, load_prompts(["A?", "A longer one?"]))
    assert found == answers(model, byte_tokenizer(), load_prompts(["A?", "A longer one?"]))


def test_logits_that_are_nan_are_an_error_and_not_a_crash_of_the_device() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinite while it answers"):
        answers(model, byte_tokenizer(), load_prompts(["A?"]))


def test_an_adapter_answers_through_peft() -> None:
    model = lora(tiny_model())
    found = answers(model, byte_tokenizer(), load_prompts(["A?"]))
    assert [s.token_ids for s in found] == [
        s.token_ids for s in answers(tiny_model(), byte_tokenizer(), load_prompts(["A?"]))
    ], "an adapter that has learnt nothing must change nothing"
