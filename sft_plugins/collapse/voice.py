"""What the watch tells whoever trains: on rank 0 alone, between the lines of a progress bar, and the same thing once."""

from __future__ import annotations

from collections.abc import Mapping

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from sft_plugins.collapse.distributed import Ranks
from sft_plugins.collapse.monitor import Outcome
from sft_plugins.collapse.report.wording import percent

__all__ = ["Voice"]


class Voice:
    """Of one training; another begins with a voice of its own, which has told nothing yet."""

    def __init__(self, ranks: Ranks) -> None:
        self._silent = ranks.rank != 0
        self._told: set[str] = set()

    def say(self, message: str) -> None:
        if not self._silent:
            tqdm.write(message)

    def say_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self.say(message)

    def tell(self, outcome: Outcome) -> None:
        """The level after a probe with answers, and each alarm when it is first seen, confirmed, or changes its level."""
        verdict = outcome.verdict
        if outcome.tier == 2:
            self.say(f"collapse: step {outcome.step}: {_level(outcome)}")
        for finding in (*verdict.findings, *verdict.pending):
            certain = finding in verdict.findings
            key = f"{finding.code} {finding.level} {certain}"  # the evidence differs from probe to probe
            if finding.level in ("warn", "critical") and key not in self._told:
                self._told.add(key)
                tail = finding.suggestion if certain else "To be confirmed by the next probe."
                self.say(f"collapse: {finding.level.upper()} {finding.code}: {finding.evidence}. {tail}")

    def tell_cost(self, cost: Mapping[str, float], budget: float | None) -> None:
        """What watching took, from `Cadence.summary`."""
        limit = "no budget" if budget is None else f"budget {budget:.1%}"
        over = budget is not None and cost["share"] > budget
        self.say(
            f"collapse: {cost['probes_tier2']:.0f} probes with answers, {cost['probes_tier1']:.0f} without; "
            f"{cost['seconds']:.1f} s = {cost['share']:.1%} of {cost['wall_seconds']:.0f} s wall time ({limit}), "
            f"tiers 0 and 1 {cost['share_tier01']:.2%}."
            + (" Over budget: the run was too short for its baseline and one look at the end." if over else "")
        )


def _level(outcome: Outcome) -> str:
    kept = outcome.verdict.estimates.get("diversity_retained")
    if kept is None:
        return outcome.verdict.level
    interval = f"{percent(kept.lo)} to {percent(kept.hi)}"
    return f"open answers keep {percent(kept.value)} of their diversity ({interval}): {outcome.verdict.level}"
