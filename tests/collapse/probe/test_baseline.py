"""A baseline is what it says it is: cached under what it depends on, refused where it differs, never made up on resume."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_plugins._preserve import untouched
from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.probe.baseline import adapter_is_exact, load_baseline, model_fingerprint
from sft_plugins.collapse.probe.probe import Prober
from sft_plugins.collapse.probe.prompts import load_prompts
from sft_plugins.errors import CollapseError
from testkit import watched_runs
from testkit.watched_runs import PROMPTS, byte_tokenizer, lora, rows, tiny_model, train


def prober(model: Any, *, prompts: int = 3, **changes: Any) -> Prober:
    options = {"samples_per_prompt": 2, "max_new_tokens": 6, "seed": 0, "eval_pairs": rows(3)}
    return Prober(model, byte_tokenizer(), load_prompts(PROMPTS[:prompts]), **{**options, **changes})


def take(model: Any, *, kind: str = "train_begin", **changes: Any) -> Any:
    with untouched(model):
        one = prober(model, **changes)
        return one.take_baseline(model, kind=kind, identity=one.identity(model, base_only=kind == "adapter_off"))


watcher = partial(watched_runs.watcher, prompts=PROMPTS[:4])


def test_a_baseline_has_sixteen_answers_and_survives_its_file(tmp_path: Path) -> None:
    taken = take(tiny_model())
    assert len(taken.samples) == 3 * 16
    path = taken.save(tmp_path)
    read = load_baseline(path, taken.identity)
    assert read.samples == taken.samples
    assert (read.key, read.kind, read.seconds) == (taken.key, taken.kind, taken.seconds)
    for name in ("frozen", "held_out"):
        a, b = getattr(read, name), getattr(taken, name)
        assert torch.equal(a.row, b.row)
        assert torch.equal(a.stats.nll, b.stats.nll)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no scratch file is left"


@pytest.mark.parametrize(
    ("part", "model", "changes"),
    [
        ("model", {"seed": 1}, {}),
        ("sampling", {}, {"max_new_tokens": 7}),
        ("sampling", {}, {"seed": 1}),
        ("eval_pairs", {}, {"eval_pairs": rows(2)}),
    ],
)
def test_a_baseline_of_something_else_is_refused(tmp_path: Path, part: str, model: dict, changes: dict) -> None:
    path = take(tiny_model()).save(tmp_path)
    other = tiny_model(**model)
    expected = prober(other, **changes).identity(other, base_only=False)
    with pytest.raises(CollapseError, match=f"differs from this run in: {part}$|in: {part} ") as caught:
        load_baseline(path, expected)
    assert caught.value.code == "baseline_mismatch"


def test_a_cut_file_is_refused_and_a_missing_one_named(tmp_path: Path) -> None:
    path = take(tiny_model()).save(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CollapseError, match="not a baseline") as caught:
        load_baseline(path, {})
    assert caught.value.code == "baseline_broken"
    with pytest.raises(CollapseError, match="no baseline file"):
        load_baseline(tmp_path / "none.npz", {})


def test_one_changed_weight_changes_the_fingerprint_and_an_adapter_does_not() -> None:
    model = tiny_model()
    plain = model_fingerprint(model, base_only=False)
    adapted = lora(tiny_model())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    assert model_fingerprint(adapted, base_only=True) == plain
    assert model_fingerprint(adapted, base_only=False) != plain
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    assert model_fingerprint(model, base_only=False) != plain


@pytest.mark.parametrize(
    ("changes", "exact"),
    [({}, True), ({"bias": "all"}, False), ({"modules_to_save": ["lm_head"]}, True)],
)
def test_adapter_off_is_exact_only_if_nothing_else_is_trained(changes: dict, exact: bool) -> None:
    model = lora(tiny_model(attention_bias=True), **changes)
    found, why = adapter_is_exact(model)
    assert found is exact
    assert ("outside the adapter" in why) is not exact
    assert adapter_is_exact(tiny_model()) == (False, "the model has no adapter")


def test_under_lora_the_baseline_is_the_base_model() -> None:
    model = lora(tiny_model())
    expected = [s.token_ids for s in take(tiny_model()).samples]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    flags = [p.requires_grad for p in model.parameters()]
    assert [s.token_ids for s in take(model, kind="adapter_off").samples] == expected
    assert [s.token_ids for s in take(model).samples] != expected
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("how", ["new", "trained", "pissa", "dora"])
def test_an_adapter_that_changes_the_base_already_is_no_way_back_to_the_start(how: str, tmp_path: Path) -> None:
    """Switched off, an adapter trained before gives the base of that training; PiSSA's gives a model that never was."""
    changes: dict[str, Any] = {"pissa": {"init_lora_weights": "pissa"}, "dora": {"use_dora": True}}.get(how, {})
    model = lora(tiny_model(), **changes)
    if how == "trained":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    begun = [s.token_ids for s in take(copy.deepcopy(model), prompts=4).samples]
    train(model, tmp_path / "run", callbacks=[watcher(tmp_path / "watched", eval_pairs=rows(3))], max_steps=2)
    baseline = _run_head(tmp_path / "watched")["baseline"]
    changed = how in ("trained", "pissa")
    assert baseline["kind"] == ("train_begin" if changed else "adapter_off")
    assert ("changes the base already" in baseline["origin"]) is changed
    kept = load_baseline(next((tmp_path / "watched").glob("baseline-*.npz")), {})
    assert [s.token_ids for s in kept.samples] == begun


def test_a_resumed_run_whose_adapter_was_no_new_one_keeps_its_baseline(tmp_path: Path) -> None:
    def adapted() -> Any:
        torch.manual_seed(3)
        return lora(tiny_model(), init_lora_weights=False)

    out, watched = tmp_path / "run", tmp_path / "watched"
    train(adapted(), out, callbacks=[watcher(watched)], max_steps=2, save_strategy="steps", save_steps=2)
    first = _run_head(watched)["baseline"]
    train(adapted(), out, callbacks=[watcher(watched)], resume=str(out / "checkpoint-2"), max_steps=4)
    head = _run_head(watched)
    assert (head["step"], first["kind"], head["baseline"]["kind"]) == (2, "train_begin", "train_begin")
    assert head["baseline"]["key"] == first["key"]


def _run_head(folder: Path) -> dict[str, Any]:
    return [r for r in read_history(folder / "history.jsonl") if r["kind"] == "run"][-1]


@pytest.mark.slow
def test_full_fine_tuning_resumes_with_the_baseline_it_began_with(tmp_path: Path) -> None:
    out, watched = tmp_path / "run", tmp_path / "watched"
    train(tiny_model(), out, callbacks=[watcher(watched)], max_steps=4, save_strategy="steps", save_steps=2)
    first = _run_head(watched)
    train(tiny_model(), out, callbacks=[watcher(watched)], resume=str(out / "checkpoint-2"), max_steps=4)
    head = _run_head(watched)
    assert head["step"] == 2
    assert head["baseline"]["key"] == first["baseline"]["key"]
    records = read_history(watched / "history.jsonl")
    assert [r["step"] for r in records if r["kind"] == "probe"] == [2, 4], "what was taken back is not told twice"
    assert records[-1]["kind"] == "end"


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["cache", "everything"])
def test_a_resumed_run_without_its_cache_says_no_baseline(
    tmp_path: Path, lost: str, capsys: pytest.CaptureFixture
) -> None:
    out, watched = tmp_path / "run", tmp_path / "watched"
    train(tiny_model(), out, callbacks=[watcher(watched)], max_steps=4, save_strategy="steps", save_steps=2)
    for path in list(watched.iterdir()):
        if lost == "everything" or path.suffix == ".npz":
            path.unlink()
    again = watcher(watched)
    train(tiny_model(), out, callbacks=[again], resume=str(out / "checkpoint-2"), max_steps=4)
    assert _run_head(watched)["baseline"] is None
    assert "no baseline: the run resumes at step 2" in capsys.readouterr().out
    assert not list(watched.glob("*.npz")), "the half-trained model must not become a baseline"
    assert again.verdict is not None
    assert "no_baseline" in again.verdict.codes


def test_a_second_run_takes_the_cached_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny_model(), tmp_path / "a", callbacks=[watcher(tmp_path / "w")], max_steps=1)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("taken again")

    monkeypatch.setattr(Prober, "take_baseline", never)
    train(tiny_model(), tmp_path / "b", callbacks=[watcher(tmp_path / "w")], max_steps=1)
    assert "from the cache" in _run_head(tmp_path / "w")["baseline"]["origin"]
    with pytest.raises(CollapseError, match="taken again"):
        train(tiny_model(seed=4), tmp_path / "c", callbacks=[watcher(tmp_path / "w")], max_steps=1)


def test_a_baseline_given_by_path_must_be_of_this_model(tmp_path: Path) -> None:
    train(tiny_model(), tmp_path / "a", callbacks=[watcher(tmp_path / "w")], max_steps=1)
    (path,) = (tmp_path / "w").glob("*.npz")
    with pytest.raises(CollapseError, match="differs from this run in: model"):
        train(tiny_model(seed=4), tmp_path / "b", callbacks=[watcher(tmp_path / "v", baseline=path)], max_steps=1)
    train(tiny_model(), tmp_path / "c", callbacks=[watcher(tmp_path / "v", baseline=path)], max_steps=1)


def test_a_degenerate_baseline_is_said_to_be_unusable(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_().add_(1)
        model.model.embed_tokens.weight.zero_().add_(1)
        model.lm_head.weight[70] = 9.0  # the same letter for ever
    watch = watcher(tmp_path, max_new_tokens=12)
    train(model, tmp_path / "out", callbacks=[watch], max_steps=1)
    assert "the baseline cannot serve" in capsys.readouterr().out
    assert watch.verdict is not None
    assert "baseline_unusable" in watch.verdict.codes
