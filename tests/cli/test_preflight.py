"""`sft-plugins preflight` as a user calls it: exit codes, JSON, quiet, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig
from typer.testing import CliRunner

from sft_plugins.cli import app
from testkit.browser import open_page
from testkit.conversations import assistant, user
from testkit.tokenizers import build_tokenizer

HARMFUL = "<script>console.error('run')</script>"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    build_tokenizer("qwen", eos="<|im_end|>").save_pretrained(tmp_path / "model")
    AutoConfig.for_model("opt").save_pretrained(tmp_path / "model")
    rows = [
        {"messages": [user("Hi"), assistant("Hello.")]},
        {"messages": [user(HARMFUL), {"role": HARMFUL, "content": "x"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = tmp_path / "trl.yaml"
    write(
        path,
        {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "rows.jsonl"), "packing": True},
    )
    return path


def write(path: Path, config: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["preflight", *map(str, arguments)])


def test_a_red_verdict_is_printed_and_exits_with_1(config: Path) -> None:
    done = run(config)
    assert done.exit_code == 1, done.output
    assert "RED: do not train this" in done.stdout
    for words in ("contamination P1", "bad_schema M12", "one epoch:"):
        assert words in " ".join(done.stdout.split())


def test_json_is_one_document_with_every_part(config: Path) -> None:
    done = run(config, "--json")
    assert done.exit_code == 1
    verdict = json.loads(done.stdout)
    assert verdict["verdict"] == "red"
    assert verdict["parts"]["packing"] == "red"
    assert {"bad_schema", "contamination"} <= {finding["code"] for finding in verdict["findings"]}
    assert verdict["cost"]["supervised_tokens"] > 0
    assert verdict["masking"]["dataset_name"]["rows_in"] == 2


def test_quiet_says_nothing_and_the_exit_code_tells(config: Path) -> None:
    done = run(config, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "")


@pytest.mark.parametrize("flag", [[], ["--json"]])
@pytest.mark.parametrize("fault", ["no file", "broken data", "no tokenizer", "unwritable page"])
def test_what_cannot_be_used_exits_with_2_and_no_traceback(fault: str, flag: list[str], config: Path) -> None:
    more: list[Any] = []
    if fault == "no file":
        config = config.with_name("none.yaml")
    elif fault == "broken data":
        with (config.parent / "rows.jsonl").open("a") as file:
            file.write('\n{"messages": [}')
    elif fault == "no tokenizer":
        (config.parent / "bare").mkdir()
        more = ["--model", config.parent / "bare"]
    else:
        more = ["--html", config / "page.html"]  # below a file
    done = run(config, *more, *flag)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert isinstance(done.exception, SystemExit)
    words = {"no file": "none.yaml", "broken data": "line 3", "no tokenizer": "bare", "unwritable page": "page.html"}[
        fault
    ]
    assert "".join(words.split()) in "".join(done.stderr.split())  # it may be broken anywhere
    if flag:
        assert json.loads(done.stdout)["error"]["message"]


def test_the_page_holds_the_verdict_and_needs_nothing(config: Path) -> None:
    """In a real browser: no console error, no request, text of the data escaped, every card reached by the keyboard."""
    page_path = config.with_name("page.html")
    assert run(config, "--html", page_path).exit_code == 1
    for dark in (False, True):
        page = open_page(page_path, dark=dark)
        assert (page.console, page.requests) == ([], [])
        assert "Do not train this" in page.text
        assert "contamination" in page.text
        assert all(stop.ring for stop in page.tab_stops)
        assert sum(stop.tag == "summary" for stop in page.tab_stops) >= 2
