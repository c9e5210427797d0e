"""The page says what the history holds, in words, loads nothing, and exists also where parts are missing."""

from __future__ import annotations

import dataclasses
import doctest
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_plugins._report import plain
from sft_plugins.collapse.callback import ModeCollapseCallback
from sft_plugins.collapse.detect import verdict
from sft_plugins.collapse.history import History, config_hash, read_history
from sft_plugins.collapse.report import page as module
from sft_plugins.collapse.report.page import write_report
from sft_plugins.collapse.report.summary import HEADLINES, summarise
from sft_plugins.errors import CollapseError
from testkit.watched_runs import OPTIONS, PROMPTS, byte_tokenizer, fake_embedder, rows, tiny_model, train

EVIL = "<script>alert(1)</script> & so on"


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run's history: three probes, held-out pairs, an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    watch = ModeCollapseCallback(
        byte_tokenizer(),
        PROMPTS,
        **{**OPTIONS, "embedder": fake_embedder, "eval_pairs": rows(3), "every_steps": 2, "output_dir": folder / "w"},
    )
    train(tiny_model(), folder, callbacks=[watch], eval_strategy="steps", eval_steps=2)
    assert watch.history_path is not None
    return watch.history_path


def edited(history: Path, folder: Path, edit: Any) -> Path:
    """A copy of the history with every record passed through `edit` (None leaves it out)."""
    records = [edit(json.loads(line)) for line in history.read_text().splitlines()]
    target = folder / "history.jsonl"
    target.write_text("\n".join(json.dumps(r) for r in records if r is not None) + "\n")
    return target


class Links(HTMLParser):
    """What a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "data", "xlink:href") and value and not value.startswith("#"):
                self.loads.append(value)


def test_the_page_is_self_contained_and_has_every_picture(history: Path, tmp_path: Path) -> None:
    page = write_report(history, tmp_path)
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.loads == []
    assert "script" not in links.tags
    assert "@import" not in text
    assert not re.search(r"url\((?!#|['\"]?#)", text)
    assert links.tags.count("svg") == 6
    names = {p.name for p in tmp_path.glob("*.png")}
    assert names == {f"{n}.png" for n in ("diversity", "forks", "losses", "map", "positions", "trade")}


def test_pictures_follow_light_and_dark(history: Path, tmp_path: Path) -> None:
    text = write_report(history, tmp_path).read_text()
    assert "prefers-color-scheme: dark" in text
    svg = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--now)" in svg
    fixed = set(re.findall(r"#[0-9a-fA-F]{6}\b", svg))
    assert not fixed, "a fixed colour would vanish on one of the two backgrounds"


def test_what_people_read_is_there(history: Path, tmp_path: Path) -> None:
    text = write_report(history, tmp_path).read_text()
    for heading in ("What is watched", "What happened", "What to do", "Answers side by side", "How far to trust this"):
        assert heading in text
    assert "Tell a story." in text
    assert "arXiv 2604.16027" in text
    assert "budget lifted" in text


def test_the_page_says_where_prompts_are_too_few_for_its_intervals(history: Path, tmp_path: Path) -> None:
    report = summarise(read_history(history))
    assert "5 open prompts were asked" in write_report(history, tmp_path).read_text()
    more = [{"id": i, "text": f"question {i}", "tag": "open"} for i in range(6, 17)]
    enough = dataclasses.replace(report, run={**report.run, "prompts": [*report.run["prompts"], *more]})
    assert enough.few_prompts is None


def test_answers_of_a_model_cannot_write_the_page(history: Path, tmp_path: Path) -> None:
    def evil(record: dict[str, Any]) -> dict[str, Any]:
        for group in record.get("samples", []):
            for sample in group:
                sample["text"] = EVIL
        return record

    text = write_report(edited(history, tmp_path, evil), tmp_path).read_text()
    assert EVIL not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; so on" in text


@pytest.mark.parametrize("level", ["critical", "warn", "info", "ok"])
def test_the_headline_is_the_verdict_of_the_last_probe(history: Path, tmp_path: Path, level: str) -> None:
    finding = {"level": level, "code": "narrowing", "evidence": "the evidence", "suggestion": "the advice"}

    def judged(record: dict[str, Any]) -> dict[str, Any]:
        if record["kind"] == "probe":
            reached = record["step"] >= 4
            record["verdict"] |= {"level": level if reached else "ok", "findings": [finding] if reached else []}
        return record

    path = edited(history, tmp_path, judged)
    report = summarise(read_history(path))
    assert report.status == level
    assert report.first_alarm == (4 if level in ("critical", "warn") else None)
    text = write_report(path, tmp_path).read_text()
    assert HEADLINES[level].replace("'", "&#39;") in text
    assert "The evidence." in text
    assert "the advice" in text


@pytest.mark.parametrize(
    ("codes", "headline"), [(["reasoning_lost"], "reasoning"), (["reasoning_lost", "narrowing"], "critical")]
)
def test_the_headline_is_what_the_highest_finding_says(
    history: Path, tmp_path: Path, codes: list[str], headline: str
) -> None:
    """A model that only reasons less has not made its answers the same."""
    findings = [{"level": "critical", "code": code, "evidence": "e", "suggestion": "s"} for code in codes]

    def judged(record: dict[str, Any]) -> dict[str, Any]:
        if record["kind"] == "probe":
            record["verdict"] |= {"level": "critical", "findings": findings}
        return record

    assert summarise(read_history(edited(history, tmp_path, judged))).headline == HEADLINES[headline]


def test_an_alarm_of_the_last_look_alone_is_never_called_healthy(history: Path, tmp_path: Path) -> None:
    """A collapse that only the run's last look saw is not confirmed; nor is it nothing to report."""
    finding = {"level": "critical", "code": "narrowing", "evidence": "the evidence", "suggestion": "the advice"}

    def judged(record: dict[str, Any]) -> dict[str, Any]:
        if record["kind"] == "probe":
            record["verdict"] |= {"level": "ok", "findings": [], "pending": [finding]}
        return record

    path = edited(history, tmp_path, judged)
    assert summarise(read_history(path)).status == "unconfirmed"
    text = write_report(path, tmp_path).read_text()
    assert HEADLINES["unconfirmed"] in text
    assert "Critical, not confirmed yet" in text
    assert not re.search("Healthy|Nothing to report|Nothing. Keep watching", text)


def test_a_run_without_baseline_is_not_called_healthy(history: Path, tmp_path: Path) -> None:
    def blind(record: dict[str, Any]) -> dict[str, Any] | None:
        if record["kind"] == "run":
            record |= {"baseline": None, "no_baseline": "the run resumes at step 2"}
        if record["kind"] == "probe":
            record |= {"intervals": {}}
            record["verdict"] |= {"level": "ok", "findings": []}
        return None if record["kind"] == "baseline" else record

    path = edited(history, tmp_path, blind)
    assert summarise(read_history(path)).status == "blind"
    text = write_report(path, tmp_path).read_text()
    assert "No verdict" in text
    assert "the run resumes at step 2" in text
    assert "Healthy" not in text


def test_a_run_that_ended_before_its_first_probe_has_a_page(history: Path, tmp_path: Path) -> None:
    path = edited(history, tmp_path, lambda r: r if r["kind"] in ("run", "baseline") else None)
    assert "No verdict" in write_report(path, tmp_path).read_text()


def test_without_matplotlib_the_page_has_its_words(
    history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    text = write_report(history, tmp_path).read_text()
    assert "<svg" not in text
    assert "Pictures need matplotlib" in text
    assert list(tmp_path.glob("*.png")) == []


def test_the_report_is_data_first(history: Path) -> None:
    data = summarise(read_history(history)).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_history_is_appended_to_and_forgets_a_future_that_did_not_happen(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    first = History(path)
    first.append("run", step=0)
    for step in (2, 4, 6):
        first.append("probe", step=step)
    size = path.stat().st_size
    second = History(path)
    second.append("run", step=4)
    second.append("probe", step=5)
    assert path.stat().st_size > size
    assert [(r["kind"], r["step"]) for r in read_history(path)] == [
        ("run", 0), ("probe", 2), ("probe", 4), ("run", 4), ("probe", 5),
    ]  # fmt: skip
    History(path).append("run", step=0)
    assert [r["kind"] for r in read_history(path)] == ["run"], "a fresh run in the same folder is a run of its own"


def test_a_line_cut_by_a_crash_is_left_out_and_any_other_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"kind": "run", "step": 0}\n{"kind": "pro')
    assert len(read_history(path)) == 1
    path.write_text('{"kind": "run", "step": 0}\n{"kind": "pro\n{"kind": "end", "step": 1}\n')
    with pytest.raises(CollapseError, match=r"line 2 of .* is not JSON"):
        read_history(path)
    path.write_text('{"kind": "run", "step": 0, "schema": 99}\n')
    with pytest.raises(CollapseError, match="schema 99"):
        read_history(path)
    with pytest.raises(CollapseError, match="cannot read the history"):
        read_history(tmp_path / "none.jsonl")


def test_numbers_that_json_cannot_hold_become_null() -> None:
    assert plain({"a": np.array([1.0, np.nan]), "b": float("inf"), "c": (np.int64(3),)}) == {
        "a": [1.0, None],
        "b": None,
        "c": [3],
    }
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1}) != config_hash({"a": 1, "b": 3})


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_last_line_cut_anywhere_is_left_out(cut: int, tmp_path: Path) -> None:
    """A running training may be in the middle of a character."""
    path = tmp_path / "history.jsonl"
    whole = b'{"kind": "run", "step": 0}\n'
    path.write_bytes(whole + '{"kind": "probe", "step": 1, "text": "日本"}\n'.encode()[:-cut])
    assert [record["kind"] for record in read_history(path)] == (["run", "probe"] if cut == 1 else ["run"])


def test_an_answer_may_hold_any_kind_of_line_end(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for step, end in enumerate(["\u2028", "\u2029", "\x85", "\r", "\n", "\x0b"]):
        history.append("run" if step == 0 else "probe", step=step, text=f"a{end}b")
    assert [record["text"][1] for record in read_history(tmp_path / "history.jsonl")] == list(
        "\u2028\u2029\x85\r\n\x0b"
    )


def test_what_is_rounded_to_zero_has_no_sign(history: Path, tmp_path: Path) -> None:
    result = doctest.testmod(verdict)
    assert (result.failed, result.attempted) == (0, 1)

    def gone(record: dict[str, Any]) -> dict[str, Any]:
        if record["kind"] == "probe" and record["measures"]:
            record["intervals"]["diversity_retained"] = [-1e-7, -2e-7, 1e-7]
            record["values"] |= {"diversity": -1e-7, "gap": -1e-7}
        return record

    path = edited(history, tmp_path, gone)
    report = summarise(read_history(path))
    assert report.kept is not None
    assert report.kept[1:] == ("0%", "0%", "0%")
    now = {row["title"]: row["now"] for row in report.figures}
    assert (now["Variety of answers"], now["Over-confidence"]) == ("0.000", "+0.000")
    page = " ".join(write_report(path).read_text(encoding="utf-8").split())
    assert "<strong>0%</strong> of the variety it had before training (95% interval 0% to 0%)." in page
