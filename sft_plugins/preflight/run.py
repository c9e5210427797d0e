"""Preflight: everything that can be seen before training, in one pass over the data and none over the weights.

Plan ─┬─ each source of rows ── masks.check_entry ──► faults, masked rows
      ├─ masked rows ── packs.cost_of ──► tokens, steps
      └─ architecture's twin ── doctor.diagnose ──► is packing exact
                                                      └──► Verdict: green, amber or red
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sft_plugins.preflight.doctor import Diagnosis, diagnose
from sft_plugins.preflight.findings import PARTS, Colour, Finding, Part, colour
from sft_plugins.preflight.masks import EntryCheck, check_entry
from sft_plugins.preflight.models import load_config, load_tokenizer
from sft_plugins.preflight.packs import Cost, as_dict, cost_of, packing_findings
from sft_plugins.preflight.plan import Plan
from sft_plugins.preflight.tiny_model.twin import twin

if TYPE_CHECKING:
    from sft_plugins.packing import PackReport


_NEVER = ("the weights", "memory and speed", "learning rate and the other settings of the optimizer")
"""What no preflight looks at."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What preflight comes to; `not_checked` lists what its colour says nothing of."""

    plan: Plan
    findings: tuple[Finding, ...]
    entries: tuple[EntryCheck, ...]
    packing: PackReport | None
    diagnosis: Diagnosis | None
    cost: Cost | None
    seconds: float
    not_checked: tuple[str, ...]

    @property
    def colour(self) -> Colour:
        return colour(self.findings)

    def of(self, part: Part) -> tuple[Finding, ...]:
        """The findings of one part, errors first."""
        order = {"error": 0, "warning": 1, "note": 2}
        return tuple(sorted((f for f in self.findings if f.part == part), key=lambda f: order[f.level]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        reports = {e.entry.where: e.report.to_dict() for e in self.entries if e.report is not None}
        return {
            "verdict": self.colour,
            "host": self.plan.host,
            "config": self.plan.path,
            "model": self.plan.model,
            "parts": {part: colour(self.of(part)) for part in PARTS},
            "not_checked": list(self.not_checked),
            "findings": [asdict(finding) for part in PARTS for finding in self.of(part)],
            "masking": reports,
            "packing": None if self.packing is None else self.packing.to_dict(),
            "isolation": None if self.diagnosis is None else self.diagnosis.to_dict(),
            "cost": as_dict(self.cost),
            "seconds": round(self.seconds, 2),
        }


def run_preflight(
    plan: Plan, *, limit: int | None = None, progress: Callable[[str, int], None] = lambda _stage, _rows: None
) -> Verdict:
    """Check a run before it costs anything. Nothing of the user's is changed or written.

    Args:
        limit: look at the first rows of each source only; the cost is then of those.
        progress: called with what is being looked at and the rows done since the last call.

    Raises:
        AssetError: model, data or files that cannot be read.
    """
    started = time.perf_counter()
    progress("tokenizer", 0)
    tokenizer, stops = plan.prepare(load_tokenizer(plan.tokenizer))
    findings = list(plan.findings)
    checks = []
    for entry in plan.entries:
        progress(entry.where, 0)
        advance = partial(progress, entry.where)
        check = check_entry(entry, plan, tokenizer, stop_token_ids=stops, limit=limit, advance=advance)
        checks.append(check)
        findings += check.findings
    progress("cost", 0)
    train = [check.masked for check in checks if check.masked is not None and not check.entry.evaluation]
    cost, packed, more = cost_of(plan, train)
    findings += more
    diagnosis = None
    if plan.packer is not None:
        progress("packing", 0)
        diagnosis = diagnose(twin(load_config(plan.model), attn=_here(plan.attn_implementation)))
        findings += packing_findings(plan, diagnosis)
    trained = [check for check in checks if not check.entry.evaluation]
    if trained and not any(check.report is None or check.report.rows_out for check in trained):
        findings.append(
            Finding(
                level="error", part="data", code="empty_dataset", where=plan.path, message="no row is left to train on.",
                remedy="See the faults of the rows above.",
            )
        )  # fmt: skip
    uncounted = [check.entry.where for check in trained if check.masked is None] if cost is not None else []
    return Verdict(
        plan=plan,
        findings=tuple(findings),
        entries=tuple(checks),
        packing=packed if plan.packer is not None else None,
        diagnosis=diagnosis,
        cost=cost,
        seconds=time.perf_counter() - started,
        not_checked=(
            *dict.fromkeys(finding.unchecked for finding in findings if finding.unchecked),
            *([f"rows beyond the first {limit:,} of each source"] if limit is not None else []),
            *([f"cost of {', '.join(uncounted)}, which is not masked here"] if uncounted else []),
            *_NEVER,
        ),
    )


def _here(attention: str | None) -> str | None:
    """The attention that stands in for `attention` on a CPU: kernels for GPUs only cannot be built here."""
    return attention if attention in ("eager", "sdpa") else None
