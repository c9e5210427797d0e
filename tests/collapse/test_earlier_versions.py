"""A collapse folder that 0.1.0 wrote, kept as it came: what this version makes of it.

`data/run-0.1.0` is a full fine-tuning of the tests' tiny model under 0.1.0's own watch (six steps, one probe, four prompts).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sft_plugins.collapse import soften
from sft_plugins.collapse.detect.detector import detect
from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.probe.baseline import load_baseline
from sft_plugins.collapse.probe.figures import probe_from_record
from sft_plugins.errors import CollapseError
from testkit.commands import invoke

OLD = Path(__file__).parent / "data" / "run-0.1.0"


def test_its_history_is_read_and_judged_again() -> None:
    records = read_history(OLD / "history.jsonl")
    assert [r["kind"] for r in records if r["kind"] != "log"] == ["run", "baseline", "probe", "end"]
    base, probe = (probe_from_record(r) for r in records if r["kind"] in ("baseline", "probe"))
    verdict = detect(base, [probe])
    written = next(r["intervals"] for r in records if r["kind"] == "probe")
    for name, (value, lo, hi) in written.items():
        if name != "diversity_retained":  # of a baseline that never ends an answer nothing is said of narrowing now
            found = verdict.estimates[name]
            assert (found.value, found.lo, found.hi) == pytest.approx((value, lo, hi), rel=1e-9), name


def test_its_report_is_drawn(tmp_path: Path) -> None:
    done = invoke("report", OLD, "--json", "--html", tmp_path / "page.html")
    (run,) = json.loads(done.stdout)["runs"]
    assert (run["ended"], run["report"]["step"]) == (True, 6)
    assert done.exit_code == {"blind": 3, "warn": 1, "critical": 1}.get(run["report"]["status"], 0)
    assert "Tell a story." in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_its_baseline_is_opened() -> None:
    (path,) = OLD.glob("baseline-*.npz")
    baseline = load_baseline(path, {})
    assert path.name == f"baseline-{baseline.key}.npz"
    assert len(baseline.samples) == 4 * 16


def test_it_kept_no_record_of_what_was_asked_and_soften_says_so(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "run" / "collapse")
    (tmp_path / "run" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CollapseError, match=r"0\.1\.0 kept no record") as caught:
        soften(tmp_path / "run")
    assert caught.value.code == "not_asked"
