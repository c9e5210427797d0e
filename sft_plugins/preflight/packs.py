"""Packing as the run would do it: is it exact on this architecture, and what does it come to?

Weights play no part in whether documents see each other, so a twin is asked: the same architecture, few layers, narrow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_plugins.errors import PackingError
from sft_plugins.preflight.findings import Finding, Level
from sft_plugins.preflight.plan import Plan

if TYPE_CHECKING:
    from sft_plugins.packing import PackReport
    from sft_plugins.preflight.doctor import Diagnosis

_PROVE = "isolate(model), which BlockDiagonalPackingCollator and the Axolotl plug-in call, makes it exact; or turn packing off."


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One run in tokens and steps.

    Attributes:
        tokens, supervised_tokens: of one epoch, padding not counted.
        computed_tokens: of one epoch, padding counted: packed rows full, or batches padded to their longest (expected).
        rows: of one epoch, packed where the run packs.
        steps: optimizer steps of the whole run. dropped: rows of the data that are in none of them.
    """

    tokens: int
    supervised_tokens: int
    computed_tokens: int
    rows: int
    steps: int
    epochs: float
    rows_per_step: int
    dropped: int
    packed: bool


def packing_findings(plan: Plan, diagnosis: Diagnosis) -> Iterator[Finding]:
    """What the diagnosis of the architecture's twin means for the packing that `plan` asks for."""

    def finding(level: Level, code: str, message: str, remedy: str = "", failure: str = "") -> Finding:
        where = f"{plan.host} packing"
        return Finding(
            level=level, part="packing", code=code, where=where, message=message, remedy=remedy, failure=failure
        )

    attention, what = plan.attn_implementation or diagnosis.attention, diagnosis.what
    here = (
        ""
        if attention == diagnosis.attention
        else f"`{attention}` cannot be measured here; with `{diagnosis.attention}` "
    )
    told = _told(diagnosis)
    if plan.isolated and diagnosis.report is None:
        refused = f"{here}no backend isolates documents: {diagnosis.refusal}"
        yield finding("error", "contamination", refused, "Turn packing off.", "P1")
    elif here or (not plan.isolated and diagnosis.plain == "unmeasured"):
        if diagnosis.report is not None and plan.isolated:
            told = f"`{diagnosis.report.backend}` isolates documents"
        yield Finding(
            level="warning", part="packing", code="not_measured", where=f"{plan.host} packing",
            message=f"{here}{told} ({what}).", failure="P1", unchecked=f"packing with attention `{attention}`",
            remedy="Run preflight on the machine that trains; isolate(model) proves it again when training starts."
            if plan.isolated else _PROVE,
        )  # fmt: skip
    elif plan.isolated and diagnosis.report is not None:
        backend = diagnosis.report.backend
        yield finding("note", "isolated", f"`{backend}` isolates documents, proved on {what}.")
    elif diagnosis.plain == "exact":
        yield finding("note", "isolated", f"position ids alone isolate documents with `{attention}` on {what}.")
    else:
        yield finding("error", "contamination", f"{told} ({what}).", _PROVE, "P1")
        if plan.packs_evaluation:
            wrong = "evaluation rows are packed the same way: their loss is wrong too."
            yield finding("error", "eval_contamination", wrong, _PROVE, "P11")


def _told(diagnosis: Diagnosis) -> str:
    if diagnosis.plain == "exact":
        return "position ids alone isolate documents"
    if diagnosis.plain == "leaks":
        return f"documents of one row see each other: logits change by up to {diagnosis.difference:.1e} of their scale"
    way = diagnosis.way("position_ids")
    return f"the model fails on packed rows: {way.error}" if way.error else "packed rows could not be measured"


def cost_of(plan: Plan, masked: Sequence[Any]) -> tuple[Cost | None, PackReport | None, list[Finding]]:
    """What the training rows come to; None where none is left. `masked`: data sets of masked rows."""
    from datasets import concatenate_datasets

    from sft_plugins.packing import TokenColumn, pack_dataset

    if not masked or not any(len(rows) for rows in masked):
        return None, None, []
    rows = concatenate_datasets(list(masked))
    kept = plan.trained_rows(len(rows))
    if not kept:
        return None, None, [
            Finding(
                level="error", part="data", code="empty_dataset", where=plan.path,
                message=f"no row is left to train on: all {len(rows):,} are held out, or another node's.",
                remedy="Hold out fewer rows.",
            )
        ]  # fmt: skip
    rows = rows.select(range(kept))
    longest = int(TokenColumn.of(rows, "input_ids").length.max())
    capacity = plan.max_length or longest
    try:
        report = pack_dataset(rows, capacity, overflow="drop", unsupervised="drop").report
    except PackingError as error:
        return None, None, [_unpackable(plan, error)]
    packs = plan.packer is not None
    per_step = plan.rows_per_step
    padded = report.padded.get(plan.batch_size) or report.padded_to_max_length
    cost = Cost(
        tokens=report.tokens,
        supervised_tokens=report.supervised_tokens,
        computed_tokens=report.rows * capacity if packs else padded,
        rows=report.rows if packs else report.documents,
        steps=plan.steps(report.rows if packs else report.documents),
        epochs=plan.epochs,
        rows_per_step=per_step,
        dropped=report.dropped,
        packed=packs,
    )
    findings = []
    if packs and cost.rows < per_step:
        findings.append(
            Finding(
                level="warning", part="packing", code="few_rows", where=f"{plan.host} packing",
                message=f"all data make {cost.rows:,} packed rows, fewer than the {per_step:,} of one optimizer step.",
                remedy="Lower the batch size or accumulation: one packed row holds many documents.",
            )
        )  # fmt: skip
    return cost, report, findings


def as_dict(cost: Cost | None) -> dict[str, Any] | None:
    return None if cost is None else dataclasses.asdict(cost)


def _unpackable(plan: Plan, error: PackingError) -> Finding:
    return Finding(
        level="error", part="packing", code=error.code, where=f"{plan.host} packing",
        message=error.message, remedy=error.remedy or "",
    )  # fmt: skip
