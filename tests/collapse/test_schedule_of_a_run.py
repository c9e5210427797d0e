"""When the callback looks, and what that may cost."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.schedule import Schedule, log_spaced
from testkit import watched_runs
from testkit.watched_runs import (
    added_records,
    rows,
    tiny_model,
    train,
)

watcher = partial(watched_runs.watcher, eval_pairs=rows(3))


def test_slots_are_log_spaced_and_end_with_the_run() -> None:
    slots = log_spaced(1000)
    assert slots[0] == 16
    assert slots[-1] == 1000
    assert len(slots) == 10
    gaps = [b / a for a, b in itertools.pairwise(slots)]
    assert max(gaps) / min(gaps) < 1.1
    assert log_spaced(3) == (1, 2, 3)


def test_the_callback_looks_at_slots_evaluations_and_the_end(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 3}
    watch = watcher(tmp_path / "w", every_steps=4)
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watch], max_steps=7, **options)
    assert [r["step"] for r in added_records(trainer)] == [0, 3, 4, 6, 7]


class Clock:
    """Seconds that pass only when something is simulated."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("price", [2.0, 9.0, 25.0])
@pytest.mark.parametrize("every_steps", [None, 20])
@pytest.mark.parametrize("steps", [400, 20_000])
def test_on_a_simulated_hour_cost_stays_under_budget(price: float, every_steps: int | None, steps: int) -> None:
    """Default budget: tiers 0 and 1 below 1 % of wall time, all tiers below 3 %, the baseline and the end included."""
    clock = Clock()
    cadence = Schedule(max_steps=steps, every_steps=every_steps, clock=clock, budget=0.03)
    clock.now += 2 * price  # the baseline has twice the answers
    cadence.prepaid(2 * price, price=price)
    looks = []
    for step in range(1, steps + 1):
        clock.now += 3600 * 0.97 / steps
        with cadence.paying(0):
            clock.now += 0.01 / steps
        final = step == steps
        if cadence.slot(step) or final:
            tier = cadence.tier(step, final=final)
            cadence.pending = tier < 2
            if tier:
                looks.append((step, tier))
                with cadence.paying(tier):
                    clock.now += price if tier == 2 else price / 10
    cost = cadence.summary()
    assert cost["share"] < 0.03
    assert cost["share_tier01"] < 0.01
    assert cost["seconds_baseline"] == 2 * price
    assert looks[-1] == (steps, 2), "the end is always seen"
    assert sum(tier == 2 for _, tier in looks) >= 2 if price < 25 else True
    if price == 2.0 and every_steps is None:
        assert looks[0][0] <= steps / 30, "what the budget allows is seen early"


def test_without_budget_every_slot_is_used_and_the_cost_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(tiny_model(), tmp_path / "a", callbacks=[watcher(tmp_path / "w", every_steps=1)], max_steps=2)
    out = capsys.readouterr().out
    assert "2 probes with answers" in out
    assert "no budget" in out


@pytest.mark.parametrize(
    ("tier", "baseline", "pairs", "looks"),
    [(1, "auto", rows(3), [1, 1]), (1, None, rows(3), [1, 1]), (1, None, None, []), (2, None, None, [2, 2])],
)
def test_a_look_that_only_reads_is_taken_where_there_is_something_to_read(
    tier: int, baseline: str | None, pairs: Any, looks: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Schedule, "tier", lambda self, step, *, final=False: tier)
    watch = watcher(tmp_path / "w", every_steps=1, baseline=baseline, eval_pairs=pairs)
    train(tiny_model(), tmp_path / "a", callbacks=[watch], max_steps=2)
    assert [r["tier"] for r in read_history(tmp_path / "w" / "history.jsonl") if r["kind"] == "probe"] == looks


def test_under_a_tight_budget_only_the_end_is_seen_and_the_cost_is_owned_up_to(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    watch = watcher(tmp_path / "w", every_steps=1, budget=0.0001)
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watch])
    assert [r["step"] for r in added_records(trainer)] == [0, 6]
    assert "Over budget" in capsys.readouterr().out
