"""C14 of `docs/known-failures.md`: what was not measured is never said to be healthy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sft_plugins.cli import app
from sft_plugins.collapse.detect.detector import detect
from sft_plugins.collapse.detect.verdict import Probe
from sft_plugins.collapse.metrics.per_prompt import measure
from testkit.languages import TEXTS
from testkit.watched_runs import (
    SAFE,
    added_records,
    tiny_model,
    train,
    watcher,
)


def never_ending(texts: list[str], k: int, *, cut: bool) -> Any:
    """Measures of six open prompts, each answered `k` times with two of `texts` in turn: its own, where there are so many."""
    rng = np.random.default_rng(0)
    groups = [[texts[(p + i % 2) % len(texts)] for i in range(k)] for p in range(6)]
    vectors = {text: rng.normal(size=16) for text in texts}
    return measure(
        groups,
        [[[hash((text, i)) if i else text[:4] for i in range(30)] for text in group] for group in groups],
        tags=["open"] * 6,
        embeddings=[np.stack([vectors[text] for text in group]) for group in groups],
        truncated=[[cut] * k for _ in groups],
        equal_k=4,
    )


def test_a_base_that_never_ends_an_answer_is_judged_by_its_openings_and_said_not_to_be_judged_for_narrowing() -> None:
    """C14: tuned to one sentence for everything it alarms; tuned to nothing it gives no verdict, never "ok"."""
    base = Probe(step=0, measures=never_ending(TEXTS["en"], 16, cut=True))
    collapsed = [Probe(step=i, measures=never_ending([SAFE], 4, cut=False)) for i in (1, 2)]
    verdict = detect(base, collapsed)
    assert verdict.level == "warn"
    assert {"homogeneity", "baseline_unusable"} <= verdict.codes
    assert "diversity_retained" not in verdict.estimates
    varied = [Probe(step=i, measures=never_ending(TEXTS["en"], 4, cut=True)) for i in (1, 2)]
    verdict = detect(base, varied)
    assert verdict.level == "none"
    assert "never ends one" in next(f for f in verdict.findings if f.code == "baseline_unusable").suggestion


def test_no_verdict_is_said_on_the_console_in_the_log_and_by_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """C14: without an embedder nothing is seen of narrowing."""
    watch = watcher(tmp_path / "a" / "collapse", embedder=None)
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watch], max_steps=2)
    assert watch.verdict is not None
    assert watch.verdict.level == "none"
    assert not any("collapse/level" in record for record in added_records(trainer))
    said = capsys.readouterr().out
    assert "step 2: no verdict: answers were not embedded" in said
    done = CliRunner().invoke(app, ["report", str(tmp_path / "a"), "--json"])
    assert done.exit_code == 3
    assert json.loads(done.stdout)["ok"] is False
