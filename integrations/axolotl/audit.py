"""Rows that Axolotl's own strategies labelled, held to the invariants of exact masking before the first step.

Found here: rows without loss (a typo in `roles_to_train`, empty answers), answers that end on no stop token (a template
without one, truncation), prompt text that is trained, answers that are not, first labels that predict from nothing.
"""

from __future__ import annotations

from typing import Any

from axolotl.utils.logging import get_logger

from sft_plugins.errors import MaskingError
from sft_plugins.integrations.axolotl.settings import KEY
from sft_plugins.masking import MaskReport, check_masks

LOG = get_logger("axolotl.sft_plugins")
# Options of exact masking can ask for these: turns that are not to be trained, answers cut by `overflow: truncate`.
ASKED_FOR = frozenset({"unsupervised_turn", "missing_stop"})


def audit_rows(dataset: Any, tokenizer: Any, *, name: str, level: str, ours: bool) -> MaskReport | None:
    """Check every row of `dataset` and log what was found.

    Args:
        name: what the rows are called in the log.
        level: `error`, `warn` or `off`.
        ours: whether every row comes from our own strategy, which has checked stops and turns already.

    Raises:
        MaskingError: `audit`, under `level="error"`.
    """
    if level == "off" or dataset is None:
        return None
    report = check_masks(dataset, tokenizer)
    if ours:
        report.failures = {code: found for code, found in report.failures.items() if code not in ASKED_FOR}
    stops = ", ".join(report.stop_tokens) or "nothing"
    LOG.info(
        f"sft-plugins audit of {name} rows: {report.rows_in:,} rows, {report.supervised_share:.1%} of {report.tokens:,} tokens "
        f"carry loss in {report.supervised_runs:,} answers, which end on {stops}; "
        f"{sum(found.count for found in report.failures.values()):,} faults"
    )
    if report.ok:
        return report
    summary = "; ".join(
        f"{code} in {found.count:,} rows (first {', '.join(map(str, found.first_rows))}): {found.example}"
        for code, found in report.failures.items()
    )
    if level == "error":
        raise MaskingError(
            f"the {name} rows are not masked exactly: {summary}",
            code="audit",
            remedy="Mask them with `type: sft_plugins.integrations.axolotl.strategy`, correct the dataset's settings, or "
            f"set `{KEY}.masking.audit: warn`.",
        )
    LOG.warning(f"sft-plugins audit: {summary}\n{report}")
    return report
