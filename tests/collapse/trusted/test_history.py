"""C13, C15, C17 of `docs/known-failures.md`: a history cut by a crash, weights put back, another run in the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from sft_plugins.collapse.history import History, read_history
from sft_plugins.collapse.schedule import Schedule
from sft_plugins.collapse.session import Session
from sft_plugins.errors import CollapseError
from testkit.watched_runs import (
    PROMPTS,
    added_records,
    lora,
    tiny_model,
    train,
    watcher,
)

# --- C13: a crash in mid-line -----------------------------------------------------------------------------------------


def test_a_history_cut_at_any_byte_costs_one_line(tmp_path: Path) -> None:
    """C13: whatever the crash left, the resumed run's records are all read, and of the others all but the cut one."""
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.append("run", step=0, config={})
    history.append("probe", step=1, text='é {"kind": "run"} \u2028')
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = History(path)
        again.append("run", step=1, config={})
        again.append("probe", step=2)
        read_back = [(r["kind"], r["step"]) for r in read_history(path) if r["kind"] != "problem"]
        first = whole.index(b"\n")
        kept = [("run", 0)] * (cut >= first) + [("probe", 1)] * (cut >= len(whole) - 1)
        assert read_back == [*kept, ("run", 1), ("probe", 2)], cut
        lost = [r for r in read_history(path) if r["kind"] == "problem"]
        assert len(lost) == (cut not in (0, first, first + 1, len(whole) - 1, len(whole))), cut


def test_a_resumed_run_that_0_1_0_glued_to_a_cut_line_is_read(tmp_path: Path) -> None:
    """C13: histories that exist are not lost."""
    path = tmp_path / "history.jsonl"
    lines = [
        {"kind": "run", "step": 0},
        {"kind": "probe", "step": 1},
        {"kind": "run", "step": 1},
        {"kind": "probe", "step": 2},
    ]
    first, cut, *rest = [json.dumps(line) for line in lines]
    path.write_text(first + "\n" + cut[:9] + rest[0] + "\n" + rest[1] + "\n")
    assert [(r["kind"], r["step"]) for r in read_history(path) if r["kind"] != "problem"] == [
        ("run", 0),
        ("run", 1),
        ("probe", 2),
    ]


def test_a_line_that_no_crash_explains_is_an_error_whose_remedy_deletes_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"kind": "run", "step": 0}\n{"kind": "pro\n{"kind": "probe", "step": 2}\n')
    with pytest.raises(CollapseError, match="line 2") as caught:
        read_history(path)
    assert "whole" in str(caught.value.remedy)


# --- C15: a look is recorded under what was measured ------------------------------------------------------------------


def test_the_look_at_weights_put_back_is_recorded_at_their_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C15: early stopping at step 4 puts the weights of step 2 back; the one look there is time for is at those."""
    monkeypatch.setattr(Schedule, "tier", lambda self, step, *, final=False: 2 if final else 0)
    watch = watcher(tmp_path / "w")
    measured: list[dict[str, torch.Tensor]] = []
    own = Session._attempt

    def attempt(self: Session, monitor: Any, model: Any, *rest: Any) -> Any:
        measured.append({name: weight.detach().clone() for name, weight in model.state_dict().items()})
        return own(self, monitor, model, *rest)

    monkeypatch.setattr(Session, "_attempt", attempt)

    class Worse(EarlyStoppingCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
            metrics["eval_loss"] = float(state.global_step)
            super().on_evaluate(args, state, control, metrics, **kwargs)

    trainer = train(
        tiny_model(),
        tmp_path / "a",
        callbacks=[watch, Worse(early_stopping_patience=1)],
        max_steps=8,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    assert (trainer.state.global_step, trainer.state.best_global_step) == (4, 2)
    best = load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(measured[-1][name], weight) for name, weight in best.items()), "those weights were measured"
    records = read_history(tmp_path / "w" / "history.jsonl")
    assert [r["step"] for r in records if r["kind"] == "probe"] == [2]
    assert [r["step"] for r in added_records(trainer)] == [0, 2]
    assert watch.verdict is not None
    assert watch.verdict.step == 2


# --- C17: another run in the same folder ------------------------------------------------------------------------------


def test_a_run_resumed_with_one_prompt_more_goes_on_as_a_new_one_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """C17."""
    train(lora(tiny_model()), tmp_path / "a", callbacks=[watcher(tmp_path / "w")], save_strategy="steps", save_steps=3)
    capsys.readouterr()
    watch = watcher(tmp_path / "w", prompts=[*PROMPTS, "One more?"])
    trainer = train(lora(tiny_model()), tmp_path / "a", callbacks=[watch], resume=str(tmp_path / "a" / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert capsys.readouterr().out.count("the watch begins anew here") == 1
    records = read_history(tmp_path / "w" / "history.jsonl")
    assert [r["step"] for r in records if r["kind"] == "run"] == [3]
    assert all(len(r["measures"]["tags"]) == 7 for r in records if r.get("measures"))


def test_a_run_resumed_as_it_was_goes_on_and_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """C17: another budget and other patterns are no other run."""
    train(lora(tiny_model()), tmp_path / "a", callbacks=[watcher(tmp_path / "w")], save_strategy="steps", save_steps=3)
    watch = watcher(tmp_path / "w", boilerplate=["x"])
    train(lora(tiny_model()), tmp_path / "a", callbacks=[watch], resume=str(tmp_path / "a" / "checkpoint-3"))
    assert "anew" not in capsys.readouterr().out
    records = read_history(tmp_path / "w" / "history.jsonl")
    assert [r["step"] for r in records if r["kind"] == "run"] == [0, 3]
