"""`soften` on a run: the watch's own figures at each λ, what is recommended, and one clear error for what it cannot do."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sft_plugins.collapse import ModeCollapseCallback, soften
from sft_plugins.collapse.detect.bootstrap import Estimate
from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.options import keep_asked, read_asked
from sft_plugins.collapse.probe.probe import Prober
from sft_plugins.collapse.probe.prompts import load_prompts
from sft_plugins.collapse.softening import soften as module
from sft_plugins.collapse.softening.adapter import AdapterDial
from sft_plugins.collapse.softening.run import find_run
from sft_plugins.collapse.softening.tradeoff import Place, _recommend, checked_shares
from sft_plugins.collapse.softening.weights import WeightsDial
from sft_plugins.errors import CollapseError
from testkit.watched_runs import OPTIONS, PROMPTS, byte_tokenizer, fake_embedder, lora, rows, tiny_model, train


def watched(folder: Path, base: Path, *, full: bool = False, **changes: Any) -> Path:
    """A watched run in `folder`: its adapter (or its weights) saved as the trainer saves them."""
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {**OPTIONS, "eval_pairs": rows(5, seed=9), "embedder": fake_embedder, "every_steps": 3, **changes}
    watch = ModeCollapseCallback(byte_tokenizer(), PROMPTS, output_dir=folder / "collapse", **options)
    trainer = train(model if full else lora(model), folder, callbacks=[watch])
    trainer.save_model(str(folder))
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return watched(tmp_path_factory.mktemp("run") / "lora", base)


# --- the whole command on a run ---------------------------------------------------------------------------------------


def test_a_run_is_measured_with_the_watchs_own_probe_and_baseline(run: Path, base: Path) -> None:
    """At λ = 1 the figures are those of the run's last probe, to the bit; the baseline is the recorded one."""
    before = {path.name for path in (run / "collapse").iterdir()}
    found = soften(run, at=[0.5], embedder=fake_embedder)
    last = [r for r in read_history(run / "collapse" / "history.jsonl") if r["kind"] == "probe"][-1]
    first = found.tradeoff.places[0]
    assert [place.share for place in found.tradeoff.places] == [1.0, 0.5]
    assert first.diversity is not None
    assert first.loss is not None
    assert [first.diversity.value, first.diversity.lo, first.diversity.hi] == last["intervals"]["diversity_retained"]
    assert first.loss.value == pytest.approx(last["heldout_loss"], rel=1e-6)
    assert found.notes == ()
    assert {path.name for path in (run / "collapse").iterdir()} == before, "no second baseline"
    assert found.origin.endswith("from the cache")


def test_the_softened_adapter_is_written_whole_and_nothing_is_overwritten(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM

    chosen(monkeypatch, 0.5)
    target = tmp_path / "new" / "softened"
    found = soften(run, at=[0.5], embedder=fake_embedder, output_dir=target)
    assert found.output == target
    assert found.check is not None
    assert found.check["logits_error"] < 1e-4
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["lora_alpha"] == json.loads((run / "adapter_config.json").read_text())["lora_alpha"] / 2
    assert (target / "tokenizer_config.json").is_file()
    AutoPeftModelForCausalLM.from_pretrained(target)
    with pytest.raises(CollapseError, match="nothing is overwritten") as caught:
        soften(run, at=[0.5], output_dir=target)
    assert caught.value.code == "output_exists"
    monkeypatch.setattr(AdapterDial, "check", lambda *_: (_ for _ in ()).throw(RuntimeError("disk full")))
    with pytest.raises(RuntimeError, match="disk full"):
        soften(run, at=[0.5], embedder=fake_embedder, output_dir=tmp_path / "half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"], "nothing half written is left"


def chosen(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Whatever is measured, `share` is recommended."""
    own = module.measure_tradeoff

    def measured(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(own(*args, **kwargs), outcome="recommended", recommended=share)

    monkeypatch.setattr(module, "measure_tradeoff", measured)


def test_full_weights_are_softened_towards_their_base(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = watched(tmp_path / "full", base, full=True)
    chosen(monkeypatch, 0.25)
    found = soften(run, at=[0.25], embedder=fake_embedder)
    assert found.kind == "full"
    assert found.notes == (), "the base is bit for bit the run's own"
    got = AutoModelForCausalLM.from_pretrained(run / "softened").state_dict()
    start, end = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (base, run))
    for name, value in got.items():
        exact = start[name].double() + 0.25 * (end[name].double() - start[name].double())
        assert torch.equal(value, exact.float()), name
    assert any(not torch.equal(got[name], end[name]) for name in got)


def test_weights_of_another_shape_have_no_way_back(tmp_path: Path, base: Path) -> None:
    other = tiny_model(vocab_size=300)
    with pytest.raises(
        CollapseError, match=r"lm_head.weight is \(300, 32\) in .* and \(261, 32\) in the base"
    ) as caught:
        WeightsDial(AutoModelForCausalLM.from_pretrained(base), other, tmp_path)
    assert caught.value.code == "wrong_base"


def test_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = tiny_model(seed=3, dropout=0.0)
    for parameter in model.parameters():
        parameter.data *= 4  # far from the run's base, which hardly prefers any token
    model.save_pretrained(other)
    with pytest.raises(CollapseError, match="another model than the run's") as caught:
        soften(run, base_model=other, embedder=fake_embedder)
    assert caught.value.code == "wrong_base"


# --- what is recommended ----------------------------------------------------------------------------------------------


def at(share: float, *, healthy: bool, within: bool, level: str = "ok", loss: bool = True) -> Place:
    figure = Estimate(1.0, 0.9, 1.1, 0.5, 8)
    return Place(
        share=share, loss=figure if loss else None, loss_change=None, diversity=figure, reasoning=None, forks=None,
        level=level, codes=(), evidence=("why",), healthy=healthy, within=within,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("places", "outcome", "share"),
    [
        ([(1, True, True), (0.5, True, True)], "as_trained", 1.0),
        ([(1, False, True), (0.75, False, True), (0.5, True, True), (0.25, True, True)], "recommended", 0.5),
        ([(1, False, True), (0.75, True, False), (0.5, True, True)], "recommended", 0.5),
        ([(1, False, True), (0.5, True, False)], "none", None),
        ([(1, False, True), (0.5, False, True)], "none", None),
    ],
)
def test_the_largest_healthy_share_at_no_more_loss_is_taken(
    places: list[Any], outcome: str, share: float | None
) -> None:
    found = _recommend([at(s, healthy=h, within=w) for s, h, w in places])
    assert found[:2] == (outcome, share)


def test_without_sight_or_without_held_out_pairs_nothing_is_recommended() -> None:
    assert _recommend([at(1, healthy=False, within=True, level="none")])[0] == "blind"
    assert _recommend([at(1, healthy=True, within=False, loss=False)])[0] == "blind"


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), True, "a half"])
def test_shares_outside_are_refused(share: Any) -> None:
    with pytest.raises(CollapseError, match=r"expected numbers from 0 \(the base\) to 1") as caught:
        checked_shares([0.5, share])
    assert caught.value.code == "bad_share"


def test_one_is_always_looked_at_and_nothing_twice() -> None:
    assert checked_shares([0.5, 0.5, 0]) == (1.0, 0.5, 0.0)
    assert checked_shares(None) == (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        ("missing", "no_run", "does not exist"),
        ("file", "no_run", "is a file"),
        ("empty", "no_run", "holds neither adapter_config.json nor weights"),
        ("unwatched", "not_asked", "does not hold what the watch asked"),
        ("asked cut", "not_asked", "cannot be read"),
        ("config cut", "adapter_file", "adapter_config.json cannot be read"),
        ("prompt tuning", "not_lora", "an adapter of type PROMPT_TUNING"),
        ("dora", "lora_variant", "use_dora=True"),
        ("pissa", "lora_variant", "init_lora_weights='pissa'"),
        ("bias", "lora_variant", "bias='all'"),
        ("new option", "lora_variant", "use_tomorrow=True"),
        ("no weights", "adapter_file", "holds no weights"),
        ("sharded", "adapter_file", "adapter_model-00001-of-00002.safetensors"),
        ("cut", "adapter_file", "cannot be read"),
        ("trained beside", "lora_variant", "holds weights beside the adapter's"),
        ("other rank", "wrong_base", "does not fit"),
        ("no base", "base_model", "cannot be loaded"),
    ],
)
def test_what_is_no_softenable_run_is_said_so_and_left_alone(
    run: Path, tmp_path: Path, spoil: str, code: str, words: str
) -> None:
    bad = tmp_path / "bad"
    if spoil == "file":
        bad.write_text("x")
    elif spoil != "missing":
        shutil.copytree(run, bad, ignore=shutil.ignore_patterns("checkpoint-*", "softened"))
    config, weights, asked = (
        bad / "adapter_config.json",
        bad / "adapter_model.safetensors",
        bad / "collapse" / "asked.json",
    )
    changes: dict[str, dict[str, Any]] = {
        "prompt tuning": {"peft_type": "PROMPT_TUNING"}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"},
        "bias": {"bias": "all"}, "new option": {"use_tomorrow": True}, "other rank": {"r": 3},
    }  # fmt: skip
    if spoil in changes:
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes[spoil]}))
    elif spoil == "empty":
        config.unlink()
        weights.unlink()
    elif spoil == "unwatched":
        asked.unlink()
    elif spoil in ("asked cut", "config cut", "cut"):
        path = {"asked cut": asked, "config cut": config, "cut": weights}[spoil]
        path.write_bytes(path.read_bytes()[:-200])
    elif spoil == "no weights":
        weights.unlink()
    elif spoil == "sharded":
        weights.rename(bad / "adapter_model-00001-of-00002.safetensors")
    elif spoil == "trained beside":
        tensors = load_file(weights)
        save_file(
            {**tensors, "base_model.model.model.norm.weight": torch.zeros(32)}, weights, metadata={"format": "pt"}
        )
    elif spoil == "no base":
        asked.write_text(json.dumps({**json.loads(asked.read_text()), "model": str(tmp_path / "gone")}))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CollapseError, match=words) as caught:
        soften(bad, embedder=fake_embedder)
    assert caught.value.code == code
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_ruler_of_ones_own_must_be_handed_over_again(run: Path) -> None:
    with pytest.raises(CollapseError, match="a function of yours") as caught:
        soften(run)
    assert caught.value.code == "embedder"


# --- inputs nobody has tried ------------------------------------------------------------------------------------------


def test_the_record_of_what_was_asked_is_whole_or_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    """Prompts in six scripts come back as they were; a file cut at any byte is no record."""
    texts = ["Erzähl!", "Расскажи.", "कहानी सुनाओ।", "讲个故事。", "เล่าเรื่อง", "ប្រាប់រឿង", "x\u2028y"]
    made = [{"prompt": text, "tag": "closed" if i % 3 == 0 else "open"} for i, text in enumerate(texts)]
    prober = Prober(tiny_model(), byte_tokenizer(), load_prompts(made), max_new_tokens=3, eval_pairs=rows(1, length=6))
    options = ModeCollapseCallback(byte_tokenizer(), PROMPTS, embedder=None)._options
    path = tmp_path / "asked.json"
    keep_asked(tmp_path, prober, options, options.detector, tiny_model())
    whole = path.read_bytes()
    again = read_asked(tmp_path)
    assert [p.text for p in load_prompts(again["prompts"])] == texts
    assert [p.tag for p in load_prompts(again["prompts"])] == [row["tag"] for row in made]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(CollapseError) as caught:
            read_asked(tmp_path)
        assert caught.value.code == "not_asked"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_full_weights_with_an_index_beside_them_are_a_run(name: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "collapse", tmp_path / "collapse")
    for file in (name, f"{name}.index.json", "config.json"):
        (tmp_path / file).touch()
    found = find_run(tmp_path)
    assert (found.weights, found.kind) == (tmp_path, "full")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CollapseError, match="holds neither"):
        find_run(tmp_path)


def test_a_checkpoint_is_a_run_and_named_adapters_are_none(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "collapse", tmp_path / "out" / "collapse")
    inner = tmp_path / "out" / "checkpoint-6"
    inner.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(run / name, inner / name)
    for place in (inner, tmp_path / "out"):
        found = find_run(place)
        assert (found.weights, found.watch, found.kind) == (inner, tmp_path / "out" / "collapse", "adapter")
    inner.rename(tmp_path / "out" / "expert")
    with pytest.raises(CollapseError, match="holds neither") as caught:
        find_run(tmp_path / "out")
    assert caught.value.code == "no_run"
