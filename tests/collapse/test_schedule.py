"""The ledger of the watch against books kept beside it, and the budget of a run that was resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_plugins.collapse import session as module
from sft_plugins.collapse.callback import ModeCollapseCallback
from sft_plugins.collapse.monitor import Monitor
from sft_plugins.collapse.schedule import Schedule
from testkit.watched_runs import OPTIONS, PROMPTS, byte_tokenizer, fake_embedder, tiny_model, train


class Clock:
    """Seconds that pass only when something is simulated."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def watcher(folder: Path, **changes: Any) -> ModeCollapseCallback:
    options = {**OPTIONS, "embedder": fake_embedder, "output_dir": folder, "max_new_tokens": 4, **changes}
    return ModeCollapseCallback(byte_tokenizer(), PROMPTS, **options)


def test_what_is_paid_adds_up_after_success_and_after_an_exception() -> None:
    clock = Clock()
    schedule = Schedule(max_steps=100, clock=clock, budget=0.03)

    def broken(seconds: float) -> None:
        clock.now += seconds
        raise RuntimeError

    with schedule.paying(2):
        clock.now += 5
    with pytest.raises(RuntimeError), schedule.paying(2):
        broken(7)
    with schedule.paying(1):
        clock.now += 2
    with schedule.paying(0):
        clock.now += 1
    with schedule.paying(0):
        clock.now += 3
    clock.now += 82
    assert schedule.spent == {0: 4, 1: 2, 2: 12}
    assert schedule.runs == {0: 2, 1: 1, 2: 2}
    assert schedule.last == {1: 2, 2: 7}
    assert schedule.summary() == {
        "wall_seconds": 100, "seconds": 18, "share": 0.18, "seconds_baseline": 0, "seconds_tier01": 6,
        "share_tier01": 0.06, "probes_tier1": 1, "probes_tier2": 2,
    }  # fmt: skip


def test_the_baseline_is_paid_on_top_and_says_what_a_probe_will_cost() -> None:
    clock = Clock()
    schedule = Schedule(max_steps=100, clock=clock, budget=0.03)
    for _ in range(2):
        clock.now += 10
        schedule.prepaid(10, price=4)
    assert (schedule.spent[2], schedule.baseline, schedule.last[2], schedule.runs[2]) == (20, 20, 4, 0)


def test_a_true_clock_never_shows_more_than_the_budget() -> None:
    """Books kept here, not the schedule's own: 1,000 steps of a second, a probe of 4 wherever one is due and allowed."""
    clock, spent = Clock(), 0.0
    schedule = Schedule(max_steps=1000, every_steps=1, clock=clock, budget=0.03)
    schedule.prepaid(0, price=4)
    looks = 0
    for step in range(1, 1001):
        clock.now += 1
        if schedule.slot(step) and (tier := schedule.tier(step)):
            with schedule.paying(tier):
                clock.now += 4
            spent += 4
            looks += 1
        assert spent <= 0.03 * (0.75 * clock.now + 0.25 * (1000 + spent)) + 1e-9, step
    assert looks == 6, "of 31 seconds: seven probes of 4, one of them set aside for the end"


@pytest.mark.parametrize(("price", "tier"), [(2.99, 2), (3.01, 0)])
def test_a_resumed_run_is_projected_from_the_step_it_began_at(price: float, tier: int) -> None:
    """Steps 50 to 60 of 100 took 100 s, so 50 to 100 will take 500: 3 % of ¾ · 100 + ¼ · 500 s is 6 s, for two probes."""
    clock = Clock()
    schedule = Schedule(max_steps=100, clock=clock, budget=0.03, start_step=50)
    schedule.prepaid(0, price=price)
    schedule.last[1] = price
    clock.now += 100
    assert schedule.tier(60) == tier


@pytest.mark.parametrize(
    ("cheap", "baseline", "tier"),
    [
        (0.4, 0.0, 2),  # two probes of 2.5 s, one of them set aside for the end, and 0.9 s spent: within 6 s
        (0.6, 0.0, 1),  # not within
        (0.9, 0.0, 1),  # 0.9 + 0.5 s spent and 0.5 s to come: reading may take 2 s
        (1.1, 0.0, 0),
        (0.9, 1.5, 1),  # all in all 2.9 s spent, 0.5 s to come and 2.5 s set aside: within 6 s
        (0.9, 1.7, 0),
    ],
)
def test_what_the_budget_allows_is_decided_on_both_sides_of_each_limit(
    cheap: float, baseline: float, tier: int
) -> None:
    """At the last step nothing is projected: 6 % of 100 s are 6 s, a third of that for reading."""
    clock = Clock()
    schedule = Schedule(max_steps=100, clock=clock, budget=0.06)
    schedule.prepaid(baseline, price=2.5)
    for cost, kind in ((0.5, 1), (cheap, 0)):
        with schedule.paying(kind):
            clock.now += cost
    clock.now = 100.0
    assert schedule.tier(100) == tier
    assert schedule.tier(100, final=True) == 2, "the end is seen once, whatever it costs"


def test_the_callback_hands_on_the_step_that_training_resumes_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[dict[str, Any]] = []

    class Noted(Schedule):
        def __init__(self, **options: Any) -> None:
            began.append(options)
            super().__init__(**options)

    monkeypatch.setattr(module, "Schedule", Noted)
    options = {"save_strategy": "steps", "save_steps": 2}
    train(tiny_model(), tmp_path / "a", callbacks=[watcher(tmp_path / "w")], max_steps=4, **options)
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    train(tiny_model(), tmp_path / "a", callbacks=[watcher(tmp_path / "w")], resume=checkpoint, max_steps=4, **options)
    assert [(each["start_step"], each["max_steps"]) for each in began] == [(0, 4), (2, 4)]


def test_a_probe_that_failed_is_tried_again_before_the_next_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    own = Monitor.probe

    def once_broken(self: Monitor, model: Any, *, step: int, **options: Any) -> Any:
        asked.append(step)
        if len(asked) == 1:
            raise RuntimeError("broken on purpose")
        return own(self, model, step=step, **options)

    monkeypatch.setattr(Monitor, "probe", once_broken)
    train(tiny_model(), tmp_path / "a", callbacks=[watcher(tmp_path / "w", every_steps=3)], max_steps=7)
    assert asked == [3, 4, 6, 7]  # a slot at every third step, and the end; 4 is the second try of 3
