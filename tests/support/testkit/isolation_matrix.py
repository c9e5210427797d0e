"""One row of the isolation matrix: an architecture before `isolate`, after it, and with boundaries withheld."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.apply import isolate
from testkit.isolation_oracle import (
    Documents,
    Gap,
    Run,
    gap,
    make_documents,
    packed_batch,
    plain_batch,
    run_alone,
    run_packed,
    spill,
)
from testkit.tiny_models import WINDOW, build

LENGTHS = [5, 9, 1, 17, 3, 9]
"""Shorter than, longer than, and more than twice the window of the tiny models; equal ones; one of a single token."""
assert min(LENGTHS) < WINDOW < 2 * WINDOW < max(LENGTHS)

LOGITS, GRADIENTS = 1e-5, 1e-4

REFUSED = {
    "cpmant": ("not_causal", "a prefix language model: every token of its prompt sees the whole prompt"),
}
"""Architectures that cannot be packed: the code of the refusal, and why."""

MAY_BE_REFUSED = {(name, "not_causal") for name in ("big_bird", "doge", "megatron-bert", "rembert", "roformer")}
"""transformers 5.16 builds these without their causal mask, 5.23 with it."""

NO_GRADIENTS = {
    "reformer": "trains on rows of one fixed length only, so no document could be run alone for its gradients",
}


@dataclass(frozen=True)
class Examined:
    """What was found on one architecture; gaps are relative."""

    name: str
    model: str
    today: str
    """The batch with every boundary key, cache off, before anything is installed: exact, leaks or raises."""
    today_with_cache: str
    """The same with the model's default config, which makes a cache."""
    plain: Gap
    """Isolation off and boundaries withheld: what a naive packer gets. Large, or the matrix could not fail."""
    refusal: str
    backend: str
    passed_over: str
    found: Gap
    spill: float


def examine(name: str, **changes: Any) -> Examined:
    """Measure one architecture, tiny, in fp32 on the CPU; `changes` override its configuration."""
    tiny = build(name, **changes)
    gradients = name not in NO_GRADIENTS
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents, gradients=gradients)
    plain = gap(alone, run_packed(tiny.model, documents, gradients=gradients, batch=plain_batch))
    today = _today(tiny.model, documents, alone, {"use_cache": False})
    with_cache = _today(tiny.model, documents, alone, {})
    backend = passed_over = refusal = ""
    try:
        report = isolate(tiny.model)
        backend = report.backend
        passed_over = "; ".join(_brief(note) for note in report.notes if note.startswith("passed over"))
    except ContaminationError as error:
        refusal = error.code
    found, spilled = Gap(0.0, 0.0, 0.0), 0.0
    if not refusal:
        found = gap(alone, run_packed(tiny.model, documents, gradients=gradients))
        spilled = max(spill(tiny.model, documents, changed) for changed in (0, 3))
    kind = type(tiny.model).__name__
    return Examined(name, kind, today, with_cache, plain, refusal, backend, passed_over, found, spilled)


def table(rows: Sequence[Examined]) -> list[str]:
    """Lines of a Markdown table."""
    head = "| architecture | today | today, cache on | backend | logits | gradients | others changed | why not faster |"
    lines = [head, "| --- " * 8 + "|"]
    for row in rows:
        if row.refusal:
            code, why = REFUSED.get(row.name, (row.refusal, ""))
            served = f"refused (`{code}`) | | | | {why} |"
        else:
            gradients = (NO_GRADIENTS.get(row.name) and "–") or f"{row.found.gradients:.0e}"
            changed = "0" if row.spill == 0 else f"{row.spill:.0e}"
            why = "; ".join(part for part in (row.passed_over, NO_GRADIENTS.get(row.name)) if part)
            served = f"{row.backend} | {row.found.logits:.0e} | {gradients} | {changed} | {why} |"
        lines.append(f"| {row.name} | {row.today} | {row.today_with_cache} | {served}")
    return lines


def _today(model: torch.nn.Module, documents: Documents, alone: Run, options: dict[str, bool]) -> str:
    try:
        run = run_packed(model, documents, gradients=False, batch=lambda docs: packed_batch(docs) | options)
    except Exception as error:  # whatever model code raises on a packed batch is the finding
        return f"raises {type(error).__name__}"
    found = gap(alone, run).logits
    return "exact" if found <= LOGITS else "leaks"


def _brief(note: str) -> str:
    """`passed over varlen: ContaminationError: "[unsupported_attention] why Remedy: …"` → `varlen: why`."""
    note = note.removeprefix("passed over ").split(" (packed vs alone")[0].split(" Remedy:")[0]
    for noise in ("ContaminationError: ", "[unsupported_attention] ", '"', "'"):
        note = note.replace(noise, "")
    return note.replace("|", "/")[:120]
