"""What every command prints, and where: the result on stdout, progress and errors on stderr, one JSON document under --json.

Invariant: under --quiet stdout and stderr stay empty unless something went wrong; under --json stdout is one JSON document,
whatever happened. Exit codes are `EXIT_OK`, `EXIT_FINDINGS`, `EXIT_UNUSABLE`, `EXIT_NO_VERDICT`, and 130 after ^C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL, ERROR
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from sft_plugins._report import plain
from sft_plugins.errors import SFTPluginsError

EXIT_OK = 0
EXIT_FINDINGS = 1
"""The command did its work and found faults: audit errors, contamination, a red verdict."""
EXIT_UNUSABLE = 2
"""The command could not do its work: bad input or usage, as click has it."""
EXIT_NO_VERDICT = 3
"""What was asked about could not be judged: neither good nor bad."""
EXIT_INTERRUPTED = 130


class Output:
    """Where a command writes.

    Attributes:
        console: the result for people, on stdout; silent under `quiet` and `as_json`.
        progress: bars and remarks, on stderr; silent under `quiet`, and where stderr is no terminal bars draw nothing.
    """

    def __init__(self, *, quiet: bool, as_json: bool) -> None:
        self.quiet, self.as_json = quiet, as_json
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # data may hold what the terminal's encoding lacks, or half a character
                stream.reconfigure(errors="backslashreplace")
        self.console = _Console(quiet=quiet or as_json, highlight=False)
        self.progress = _Console(stderr=True, quiet=quiet, highlight=False)

    def emit(self, value: Mapping[str, Any]) -> None:
        """Under --json write `value` as the one document on stdout; otherwise nothing."""
        if self.as_json:
            _write_json(value)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """What is raised on purpose, and what the system refuses, is shown without the stack below it; then exit."""
        try:
            with _libraries_hushed():
                yield
        except SFTPluginsError as error:
            self._fail(error.code, error.message, row=error.row, remedy=error.remedy)
            raise typer.Exit(EXIT_UNUSABLE) from error
        except BrokenPipeError as error:  # `sft-plugins inspect … | head`: the reader has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_OK) from error
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            self._fail("os_error", f"{where}{error.strerror or error}")
            raise typer.Exit(EXIT_UNUSABLE) from error
        except KeyboardInterrupt as error:
            self._fail("interrupted", "stopped by ^C; nothing more was written.")
            raise typer.Exit(EXIT_INTERRUPTED) from error

    def _fail(self, code: str, message: str, *, row: int | None = None, remedy: str | None = None) -> None:
        where = "" if row is None else f" (row {row})"
        stderr = _Console(stderr=True, highlight=False)
        stderr.print(Text.assemble((f"error [{code}]{where}: ", "bold red"), message))
        if remedy:
            stderr.print(Text.assemble(("what to do: ", "bold"), remedy))
        self.emit(_error(code, message, row=row, remedy=remedy))


class Commands(TyperGroup):
    """The program. What a command was called with wrongly is said on stderr, and under --json as the document too."""

    def invoke(self, ctx: Any) -> Any:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            if as_json:
                called = (error.ctx or ctx).command_path
                _write_json(_error("usage", error.format_message(), remedy=f"`{called} --help` says what it takes."))
            raise


# The base of all usage errors: click's under typer 0.25, under 0.29 that of a click which typer brings along.
_UsageError: Any = typer.BadParameter.__base__


def _error(code: str, message: str, *, row: int | None = None, remedy: str | None = None) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "row": row, "remedy": remedy}}


def _write_json(value: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")
    sys.stdout.flush()


class _Console(Console):
    """A console for pipes too: lines of text are not folded there, and `guard` decides what becomes of a closed one.

    No string is markup or names an emoji: folders, columns and messages are the user's, and may be called `run[/final]` (C19).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        if soft_wrap is None and not self.is_terminal and all(isinstance(item, str | Text) for item in objects):
            soft_wrap = True
        super().print(*objects, soft_wrap=soft_wrap, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@contextmanager
def _libraries_hushed() -> Iterator[None]:
    """datasets, transformers and the hub keep their bars and remarks to themselves: the commands draw their own.

    Libraries not loaded yet read the environment; loaded ones are told. Both are put back.
    """
    wanted = {
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "critical",
        "HF_HUB_VERBOSITY": "error",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    undo: list[Callable[[], Any]] = []

    def quiet(logging: Any, level: int) -> None:
        was = logging.get_verbosity()
        logging.set_verbosity(level)
        undo.append(lambda: logging.set_verbosity(was))

    if (datasets := sys.modules.get("datasets")) is not None:
        quiet(datasets.logging, CRITICAL)
        if datasets.is_progress_bar_enabled():
            datasets.disable_progress_bars()
            undo.append(datasets.enable_progress_bars)
    if (transformers := sys.modules.get("transformers")) is not None:
        quiet(transformers.utils.logging, ERROR)
    if (hub := sys.modules.get("huggingface_hub")) is not None:
        quiet(hub.utils.logging, ERROR)
    try:
        yield
    finally:
        for step in undo:
            step()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
