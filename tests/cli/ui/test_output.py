"""What the commands print and where: tables, JSON, errors, exit codes; in a pipe, in a narrow terminal, without colour."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers
import typer
from rich.cells import cell_len
from typer.testing import CliRunner

from sft_plugins._report import plain
from sft_plugins.cli import _COMMANDS, app
from sft_plugins.cli.ui.histogram import histogram
from sft_plugins.cli.ui.output import EXIT_FINDINGS, EXIT_INTERRUPTED, EXIT_OK, EXIT_UNUSABLE, Output
from sft_plugins.errors import MaskingError
from testkit.commands import conversations, invoke, program, write_jsonl

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(12))


def run(body: Any, *, quiet: bool = False, as_json: bool = False) -> Any:
    """A command whose work is `body(output)`."""
    small = typer.Typer()

    @small.command()
    def command() -> None:
        out = Output(quiet=quiet, as_json=as_json)
        with out.guard():
            body(out)

    return CliRunner().invoke(small, [])


# --- results and errors -----------------------------------------------------------------------------------------------


def raises(error: BaseException) -> Any:
    def body(out: Output) -> None:
        out.console.print("before")
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MaskingError("no [/INST]", code="boundary", row=7, remedy="turn it"), 2, "error [boundary] (row 7): no [/INST]"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error [os_error]: /x: Permission denied"),
        (OSError("disk is full"), 2, "error [os_error]: disk is full"),
        (KeyboardInterrupt(), 130, "error [interrupted]: stopped by ^C"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_refused_is_one_message_on_stderr_and_a_document_under_json(
    error: BaseException, code: int, said: str, as_json: bool
) -> None:
    done = run(raises(error), as_json=as_json)
    assert done.exit_code == code
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.output
    if as_json:
        document = json.loads(done.stdout)
        assert document["error"]["code"] in said
        assert set(document["error"]) == {"code", "message", "row", "remedy"}
    else:
        assert done.stdout == "before\n"


def test_faults_of_the_program_itself_keep_their_traceback() -> None:
    assert isinstance(run(raises(ZeroDivisionError("bug"))).exception, ZeroDivisionError)


def test_quiet_prints_errors_and_nothing_else() -> None:
    def speaks(out: Output) -> None:
        out.console.print("a table")
        out.progress.print("a bar")
        out.emit({"a": 1})

    assert run(speaks, quiet=True).output == ""
    assert run(raises(MaskingError("no", code="boundary")), quiet=True).stderr == "error [boundary]: no\n"
    assert run(speaks).stdout == "a table\n"
    assert json.loads(run(speaks, as_json=True).stdout) == {"a": 1}


def test_exit_codes_are_those_documented() -> None:
    assert (EXIT_OK, EXIT_FINDINGS, EXIT_UNUSABLE, EXIT_INTERRUPTED) == (0, 1, 2, 130)


def test_values_become_plain_json() -> None:
    @dataclass
    class Point:
        x: float
        path: Path

    value = {
        "point": Point(math.nan, Path("a/b")), 3: (1, {2}), "numpy": np.float32(0.5), "array": np.arange(3),
        "none": None, "infinite": [math.inf, True],
    }  # fmt: skip
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == {
        "point": {"x": None, "path": "a/b"}, "3": [1, [2]], "numpy": 0.5, "array": [0, 1, 2],
        "none": None, "infinite": [None, True],
    }  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("bars", [False, True])
def test_libraries_are_hushed_while_a_command_runs_and_put_back(
    fails: bool, bars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("DATASETS_VERBOSITY", raising=False)
    transformers.utils.logging.set_verbosity_info()
    had_bars = datasets.is_progress_bar_enabled()
    (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()
    seen = []

    def state() -> tuple[Any, ...]:
        names = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY")
        loud = (datasets.logging.get_verbosity(), transformers.utils.logging.get_verbosity())
        return (datasets.is_progress_bar_enabled(), *loud, *map(os.environ.get, names))

    def look(out: Output) -> None:
        seen.append(state())
        if fails:
            raise MaskingError("no", code="bad_schema")

    before = state()
    try:
        run(look)
        assert seen == [(False, logging.CRITICAL, transformers.utils.logging.ERROR, "error", "critical")]
        assert state() == before
        assert before[0] is bars
    finally:
        transformers.utils.logging.set_verbosity_warning()
        (datasets.enable_progress_bars if had_bars else datasets.disable_progress_bars)()


# --- every command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name.removesuffix("_command") for name in _COMMANDS])
def test_help_has_an_example_and_says_what_every_command_takes(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    said = ESCAPE.sub("", done.output)
    assert done.exit_code == 0
    assert f"sft-plugins {name}" in said.split("Usage:")[1].split("\n", 1)[1]  # beyond the usage line: an example
    if name != "demo":
        assert "--quiet" in said
        assert "--json" in said


def test_help_loads_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom sft_plugins.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numba', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_the_shell_completes_commands_and_options() -> None:
    def completed(words: str, count: int) -> set[str]:
        done = program(_SFT_PLUGINS_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(count))
        return set(done.stdout.split())

    assert {"inspect", "audit", "pack"} <= completed("sft-plugins ", 1)
    assert completed("sft-plugins audit --over", 2) == {"--overflow"}
    assert completed("sft-plugins audit --overflow ke", 3) == {"keep_turns"}


@pytest.mark.parametrize(
    ("arguments", "said", "called"),
    [
        (["audit", "rows.jsonl", "--bogus"], "--bogus", "sft-plugins audit"),
        (["pack", "rows.jsonl", "--model", "m", "--max-length", "1"], "--max-length", "sft-plugins pack"),
        (["inspect", "--row", "x", "rows.jsonl", "--model", "m"], "--row", "sft-plugins inspect"),
        (["report"], "Missing argument", "sft-plugins report"),
        (["adit"], "'adit'", "sft-plugins"),
    ],
)
def test_usage_errors_are_a_document_under_json(arguments: list[str], said: str, called: str) -> None:
    done = CliRunner().invoke(app, [*arguments, "--json"], prog_name="sft-plugins")
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["row"]) == ("usage", None)
    assert said in error["message"]
    assert error["remedy"] == f"`{called} --help` says what it takes."
    assert "Usage: " in done.stderr
    assert CliRunner().invoke(app, arguments).stdout == ""


def test_unknown_options_and_values_are_usage_errors() -> None:
    for arguments in (
        ["--nothing"],
        ["audit", "x", "--model", "y", "--overflow", "cut"],
        ["pack", "x", "--model", "y"],
    ):
        assert invoke(*arguments).exit_code == 2


# --- pipes, narrow terminals, colour ----------------------------------------------------------------------------------

COMMANDS = {"inspect": [], "audit": [], "pack": ["--max-length", "64"]}


def test_in_a_pipe_there_is_no_escape_code_and_no_bar(model: Path, data: Path) -> None:
    done = program("pack", data, "--model", model, "--max-length", "64")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "█" in done.stdout
    assert "\x1b" not in done.stderr
    assert "masking" not in done.stderr  # torchao, where it is installed, has remarks of its own there


def test_in_a_pipe_lines_are_not_folded(model: Path, tmp_path: Path) -> None:
    rows = conversations(1)
    rows[0]["messages"][1]["content"] = " ".join(["a long answer"] * 40)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = invoke("inspect", path, "--model", model, "--tokens", "0").stdout.splitlines()
    assert f"[[{rows[0]['messages'][1]['content']}]]((<|im_end|>))" in lines
    assert lines[0] == f"{path} (JSON Lines, raw rows), tokenizer of {model}"
    missing = tmp_path / ("a_long_name" * 15)
    assert (
        f"error [missing_file]: {missing}: there is no such file or folder."
        in invoke("audit", missing, "--model", model).stderr.splitlines()
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_in_a_narrow_terminal_no_line_is_wider_than_it(name: str, model: Path, data: Path) -> None:
    arguments = [name, str(data), "--model", str(model), *COMMANDS[name]]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "40", "FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert done.exit_code == 0, done.output
    assert "\x1b[" in done.stdout
    lines = ESCAPE.sub("", done.stdout).splitlines()
    assert max(map(cell_len, lines)) <= 40
    assert not any("…" in line and "more tokens" not in line for line in lines)  # nothing is cut off either


@pytest.mark.parametrize("name", COMMANDS)
def test_no_color_is_obeyed_even_in_a_terminal(name: str, model: Path, data: Path) -> None:
    arguments = [name, str(data), "--model", str(model), *COMMANDS[name]]
    done = CliRunner().invoke(app, arguments, env={"NO_COLOR": "1", "FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert done.exit_code == 0, done.output
    assert not re.search(r"\x1b\[[0-9;]*\b(3[0-7]|4[0-7]|9[0-7])\b[0-9;]*m", done.stdout)
    if name == "inspect":
        assert "[[The answer is four.]]((<|im_end|>))" in done.stdout.replace("\x1b[1m", "")


def test_whoever_reads_the_pipe_may_stop_reading(model: Path, data: Path) -> None:
    inspect = f"'{sys.executable}' -c 'from sft_plugins.cli import app; app()' inspect '{data}' -m '{model}' --tokens 0"
    pipe = f"set -o pipefail; {inspect} --count 12 | head -n 1"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert "Error" not in done.stderr
    assert done.returncode == 0


def test_an_encoding_that_lacks_our_characters_gets_escapes_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    out = Output(quiet=False, as_json=False)
    out.console.print("10 → 20 \ud800")
    out.console.print(histogram([1, 2], out.console))
    sys.stdout.flush()
    assert written.getvalue().decode("ascii").splitlines()[0] == "10 \\u2192 20 \\ud800"
    assert "###" in written.getvalue().decode("ascii")
