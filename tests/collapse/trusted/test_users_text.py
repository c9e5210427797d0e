"""C19 of `docs/known-failures.md`: the user's text is never markup."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sft_plugins.cli import app
from testkit.watched_runs import (
    tiny_model,
    train,
    watcher,
)


@pytest.mark.parametrize("names", [("lr[bold]", "lr[red]"), ("run[/final]", "run:smile:"), ("[link=x]a", "{b}")])
def test_folders_are_shown_as_they_are_called(tmp_path: Path, names: tuple[str, str]) -> None:
    """C19: one run, and two side by side."""
    places = []
    for name in names:
        place = tmp_path / name
        watch = watcher(place / "collapse", embedder=None)
        train(tiny_model(), tmp_path / "scratch", callbacks=[watch], max_steps=1)
        places.append(str(place))
    runner = CliRunner(env={"COLUMNS": "200"})
    for shown in ([places[0]], places):
        done = runner.invoke(app, ["report", *shown])
        assert done.exception is None or isinstance(done.exception, SystemExit)
        for place in shown:
            assert Path(place).name in done.stdout
    gone = runner.invoke(app, ["report", str(tmp_path / "none[/x]")])
    assert "none[/x]" in gone.stdout + gone.stderr


def test_every_console_of_the_commands_takes_strings_as_they_stand() -> None:
    """C19: the kind, not the places: whatever a command prints, no string of it is markup."""
    from sft_plugins.cli.ui.output import Output

    for console in (Output(quiet=False, as_json=False).console, Output(quiet=False, as_json=False).progress):
        assert console.render_str("[bold]x[/y] :smile:").plain == "[bold]x[/y] :smile:"
    assert Console(file=io.StringIO()).render_str("[bold]x[/] :smile:").plain != "[bold]x[/] :smile:", (
        "rich's own does not"
    )
