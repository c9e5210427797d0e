"""`sft-plugins report` says what the history says, of one run or several, while it is written to and after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sft_plugins.collapse.callback import ModeCollapseCallback
from testkit.browser import open_page
from testkit.commands import invoke
from testkit.watched_runs import OPTIONS, PROMPTS, byte_tokenizer, fake_embedder, train
from testkit.watched_runs import tiny_model as tiny

FINDING = {"level": "critical", "code": "narrowing", "evidence": "the evidence", "suggestion": "the advice"}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training's output folder, its history under collapse/: one real run, judged healthy."""
    folder = tmp_path_factory.mktemp("runs") / "healthy"
    options = {**OPTIONS, "embedder": fake_embedder, "every_steps": 3, "output_dir": folder / "collapse"}
    watch = ModeCollapseCallback(byte_tokenizer(), PROMPTS, **options)
    train(tiny(), folder, callbacks=[watch])
    return changed(folder, folder, lambda r: r["verdict"].update(level="ok", findings=[], pending=[]))


@pytest.fixture(scope="module")
def collapsed(healthy: Path) -> Path:
    """The same run, its last look judged critical."""
    return changed(
        healthy, healthy.parent / "collapsed", lambda r: r["verdict"].update(level="critical", findings=[FINDING])
    )


def changed(source: Path, target: Path, edit: Any) -> Path:
    """`source` as `target`, every probe passed through `edit`."""
    lines = (source / "collapse" / "history.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if record["kind"] == "probe":
            edit(record)
    (target / "collapse").mkdir(parents=True, exist_ok=True)
    (target / "collapse" / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return target


def said(*arguments: object) -> tuple[int, dict[str, Any]]:
    done = invoke("report", *arguments, "--json")
    return done.exit_code, json.loads(done.stdout)


def test_a_healthy_run_is_exit_code_0_and_a_collapsed_one_is_1(healthy: Path, collapsed: Path) -> None:
    code, found = said(healthy)
    assert (code, found["ok"], found["runs"][0]["report"]["status"]) == (0, True, "ok")
    assert found["runs"][0]["ended"] is True
    code, found = said(collapsed)
    assert (code, found["ok"], found["runs"][0]["report"]["status"]) == (1, False, "critical")
    assert found["runs"][0]["report"]["findings"] == [FINDING]


def test_the_terminal_shows_verdict_findings_and_figures(collapsed: Path) -> None:
    done = invoke("report", collapsed)
    text = " ".join(done.stdout.split())
    advice = "critical, narrowing: the evidence. What to do: the advice"
    for words in ("Critical", "The model has collapsed", advice, "5 open prompts were asked"):
        assert words in text
    figure = json.loads(invoke("report", collapsed, "--json").stdout)["runs"][0]["report"]["figures"][0]
    assert figure["title"] in text
    assert figure["base"] in text
    assert figure["now"] in text


def test_the_file_its_folder_and_the_output_folder_are_the_same_run_and_shown_once(healthy: Path) -> None:
    history = healthy / "collapse" / "history.jsonl"
    _, found = said(healthy, healthy / "collapse", history)
    assert [Path(run["history"]) for run in found["runs"]] == [history]


def test_a_folder_of_runs_is_all_of_them(healthy: Path, collapsed: Path) -> None:
    code, found = said(healthy.parent)
    assert [run["run"] for run in found["runs"]] == ["collapsed", "healthy"], "without the folder that both lie in"
    assert code == 1, "one alarm among several is an alarm"


@pytest.mark.parametrize("width", ["50", "120"])
def test_several_runs_stand_in_one_table(
    healthy: Path, collapsed: Path, width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    done = invoke("report", healthy, collapsed)
    assert done.exit_code == 1
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith(("┏", "│", "└"))) <= int(width)
    for words in ("Healthy", "Critical", "Variety of"):
        assert words in done.stdout


def test_a_run_that_is_still_written_to_is_read(healthy: Path, tmp_path: Path) -> None:
    """A last line cut anywhere inside is left out; the run counts as not ended."""
    whole = (healthy / "collapse" / "history.jsonl").read_text().splitlines()
    cut = [*whole[:-1], whole[-1][: len(whole[-1]) // 2]]
    (tmp_path / "history.jsonl").write_text("\n".join(cut))
    code, found = said(tmp_path)
    assert code == 0
    assert found["runs"][0]["ended"] is False
    assert "running, or stopped" in " ".join(invoke("report", tmp_path).stdout.split())


def test_quiet_prints_nothing_and_the_exit_code_tells(healthy: Path, collapsed: Path) -> None:
    for folder, code in ((healthy, 0), (collapsed, 1)):
        done = invoke("report", folder, "--quiet")
        assert (done.exit_code, done.stdout, done.stderr) == (code, "", "")


def test_pages_of_one_run_and_of_several_work_in_a_browser(healthy: Path, collapsed: Path, tmp_path: Path) -> None:
    shutil.copytree(healthy, tmp_path / "<b>odd</b>")
    one, several = tmp_path / "one.html", tmp_path / "deep" / "several.html"
    assert invoke("report", healthy, "--html", one, "--quiet").exit_code == 0
    assert invoke("report", tmp_path / "<b>odd</b>", collapsed, "--html", several, "--quiet").exit_code == 1
    assert "Healthy" in open_page(one).text
    for dark, width in ((False, 1200), (True, 400)):
        page = open_page(several, dark=dark, width=width)
        assert page.console == []
        assert page.requests == []
        assert page.width <= width
        assert all(stop.ring for stop in page.tab_stops)
        assert [stop.tag for stop in page.tab_stops][:3] == ["div", "a", "a"]
        assert "<b>odd</b>" in page.text, "a name is text, never markup"
        assert "2 runs side by side" in page.text


BAD = {
    "no such run": (None, "missing_file"),
    "an empty folder": ("", "missing_file"),
    "not JSON": ('{"kind": "run"\nnonsense\n{}', "history_file"),
    "another schema": ('{"kind": "run", "step": 0, "schema": 99}\n', "history_file"),
    "another kind of JSON Lines": ('{"messages": []}\n{"messages": []}\n', "history_file"),
    "lists": ("[1, 2]\n[3]\n", "history_file"),
    "not text": (b"\xff\xfe\x00\n", "history_file"),
    "no run in it": ('{"kind": "log", "step": 1}\n', "history_file"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_run_is_said_so(case: str, tmp_path: Path) -> None:
    content, code = BAD[case]
    if content is not None:
        (tmp_path / "run").mkdir()
    if content:
        written = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "run" / "history.jsonl").write_bytes(written)
    done = invoke("report", tmp_path / "run", "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["code"] == code
    assert f"error [{code}]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_page_that_cannot_be_written_is_said_so(healthy: Path, tmp_path: Path) -> None:
    done = invoke("report", healthy, "--html", tmp_path)
    assert done.exit_code == 2
    assert "error [unwritable]" in done.stderr
