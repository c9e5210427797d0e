"""When to probe, and what it may cost.

| tier | slots | may take |
| --- | --- | --- |
| 0 | every log of the trainer | its cost is measured, too |
| 1 | log-spaced steps, evaluations, the end | a third of the budget, tiers 0 and 1 together |
| 2 | the same | the budget, all tiers together |

A slot is a step (the same on every rank); whether it is used depends on the clock (rank 0 decides). A slot refused
for its cost stays pending and is tried again every hundredth of the run: the cadence stretches. Of the allowance
`budget × time`, three quarters come as time passes and one quarter may be used ahead of it, so that the early steps,
where most of the change happens, are seen; the price of the probe at the end is set aside from the start.

    >>> log_spaced(1000, 6)
    (16, 36, 82, 189, 435, 1000)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

__all__ = ["Schedule", "log_spaced"]

_AHEAD = 0.25
_TIER1_SHARE = 1 / 3


def log_spaced(max_steps: int, count: int = 10) -> tuple[int, ...]:
    """At most `count` steps, each further from the last by the same factor, from 1/64 of the run to its end."""
    first = max(1, round(max_steps / 64))
    return tuple(sorted({round(s) for s in np.geomspace(first, max_steps, count)})) if max_steps > 0 else ()


class Schedule:
    """Slots and the ledger of what probes have cost.

    Args:
        max_steps: optimizer steps of the run.
        every_steps: a slot at every multiple; None for log-spaced slots.
        budget: largest share of wall time, for example 0.03; None for no limit.
        clock: seconds; the tests pass a simulated one.
    """

    def __init__(
        self,
        *,
        max_steps: int,
        every_steps: int | None = None,
        budget: float | None = 0.03,
        start_step: int = 0,
        started: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.max_steps, self.every_steps, self.budget, self.start_step = max_steps, every_steps, budget, start_step
        self._clock = clock
        self._started = clock() if started is None else started
        self._slots = frozenset(log_spaced(max_steps)) if every_steps is None else None
        self._retry = max(1, max_steps // 100)
        self.pending = False
        self.spent = {0: 0.0, 1: 0.0, 2: 0.0}
        self.runs = {0: 0, 1: 0, 2: 0}
        self.last = {1: 0.0, 2: 0.0}
        self.baseline = 0.0

    def slot(self, step: int) -> bool:
        """Whether a probe may be due now. A function of the steps and of `pending` only, so all ranks agree."""
        due = step in self._slots if self._slots is not None else step % (self.every_steps or 1) == 0
        return due or step >= self.max_steps or (self.pending and step % self._retry == 0)

    def tier(self, step: int, *, final: bool = False) -> int:
        """The highest tier that the budget allows now: 2, 1, or 0 for none.

        At the end (`final`), tier 2 is run even over budget if the run has not been measured once since its first
        step: a watcher that never looked is of no use. `summary` says what it cost.
        """
        if self.budget is None or (final and self.runs[2] == 0):
            return 2
        # What the probe at the end will cost is not spent on the way there.
        reserve = 0.0 if final else self.last[2]
        if self.spent_total + self.last[2] + reserve <= self._allowance(step, self.budget):
            return 2
        cheap = self.spent[0] + self.spent[1] + self.last[1]
        if cheap <= self._allowance(step, self.budget * _TIER1_SHARE) and (
            self.spent_total + self.last[1] + reserve <= self._allowance(step, self.budget)
        ):
            return 1
        return 0

    def _allowance(self, step: int, share: float) -> float:
        """Seconds that may have been spent by now."""
        elapsed = self.elapsed
        # Training alone is projected: the baseline is paid once and says nothing about the steps to come.
        steps = max(1, step - self.start_step)
        training = (elapsed - self.spent_total) * max(1.0, (self.max_steps - self.start_step) / steps)
        return share * ((1 - _AHEAD) * elapsed + _AHEAD * (training + self.spent_total))

    @contextmanager
    def paying(self, tier: int) -> Iterator[None]:
        """Books the time inside, also of a probe that fails, under `tier`."""
        begin = self._clock()
        try:
            yield
        finally:
            cost = self._clock() - begin
            self.spent[tier] += cost
            self.runs[tier] += 1
            if tier:
                self.last[tier] = cost

    def prepaid(self, seconds: float, *, price: float) -> None:
        """Book the baseline under tier 2 and take `price` as what a tier-2 probe will cost."""
        self.baseline += seconds
        self.spent[2] += seconds
        self.last[2] = price

    @property
    def elapsed(self) -> float:
        return self._clock() - self._started

    @property
    def spent_total(self) -> float:
        return sum(self.spent.values())

    def summary(self) -> dict[str, float]:
        """Seconds and shares of wall time, for the history and the closing line; the baseline is in `seconds`, and apart."""
        wall = max(self.elapsed, 1e-9)
        cheap = self.spent[0] + self.spent[1]
        return {
            "wall_seconds": wall,
            "seconds": self.spent_total,
            "share": self.spent_total / wall,
            "seconds_baseline": self.baseline,
            "seconds_tier01": cheap,
            "share_tier01": cheap / wall,
            "probes_tier1": self.runs[1],
            "probes_tier2": self.runs[2],
        }
