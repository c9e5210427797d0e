"""`sft-plugins report`: what the collapse watch saw in a finished or running training, or in several side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from sft_plugins.cli.ui.command import add_command
from sft_plugins.cli.ui.inputs import step
from sft_plugins.cli.ui.output import EXIT_FINDINGS, EXIT_NO_VERDICT, EXIT_OK, Output
from sft_plugins.errors import AssetError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sft_plugins.collapse import Report

_EPILOG = (
    "Examples: sft-plugins report runs/masked | sft-plugins report runs/a runs/b --html compare.html | "
    "sft-plugins report runs/masked/collapse/history.jsonl --json. Exit codes: 0 every run was judged and none is at "
    "warn or critical, 1 one is, 2 unusable input, 3 of a run there is no verdict."
)
HISTORY = "history.jsonl"
_PLACES = (HISTORY, f"collapse/{HISTORY}", f"*/{HISTORY}", f"*/collapse/{HISTORY}")
"""Where a folder may hold histories; the first place that has any is taken."""
VERDICTS = {
    "critical": ("Critical", "bold white on red"),
    "warn": ("Warning", "bold black on yellow"),
    "unconfirmed": ("Unconfirmed", "bold yellow"),
    "info": ("Healthy", "bold green"),
    "ok": ("Healthy", "bold green"),
    "blind": ("No verdict", "bold bright_black"),
}
_LEVELS = {"critical": "bold red", "warn": "bold yellow", "info": "green", "ok": ""}


@dataclass(frozen=True)
class Run:
    """One training: what to call it, where its history lies, what that comes to, and whether it has ended."""

    name: str
    path: Path
    report: Report
    ended: bool


def register(app: typer.Typer) -> None:
    add_command(app, report, epilog=_EPILOG)


def report(
    out: Output,
    *,
    runs: Annotated[
        list[Path], typer.Argument(help="A history.jsonl, or a training's output folder.", show_default=False)
    ],
    html: Annotated[Path | None, typer.Option(help="Write the full report as one HTML page.")] = None,
) -> int:
    """Show whether a training's answers collapse: verdict, key figures and findings, of one run or several."""
    with step(out, "reading histories"):
        found = [read_run(path) for place in runs for path in find_histories(place)]
    found = _told_apart(list({run.path.resolve(): run for run in found}.values()))
    for shown in _one(found[0]) if len(found) == 1 else _several(found):
        out.console.print(shown)
    if html is not None:
        from sft_plugins.cli.ui.pages import write_page

        with step(out, "drawing the page"):
            write_page(html, page(found))
        out.console.print(Text(f"page written to {html}"))
    alarm = any(run.report.status in ("warn", "critical") for run in found)
    blind = any(run.report.status == "blind" for run in found)
    out.emit(
        {
            "command": "report",
            "ok": not alarm and not blind,
            "runs": [
                {"run": run.name, "history": run.path, "ended": run.ended, "report": run.report.to_json()}
                for run in found
            ],
        }
    )
    return EXIT_FINDINGS if alarm else EXIT_NO_VERDICT if blind else EXIT_OK


def find_histories(place: Path) -> list[Path]:
    """The histories meant by `place`: a file, or a folder that holds one, or whose sub-folders do.

    Raises:
        AssetError: `missing_file`.
    """
    if place.is_file():
        return [place]
    for pattern in _PLACES if place.is_dir() else ():
        if found := sorted(place.glob(pattern)):
            return found
    what = "holds no history.jsonl, nor does its folder collapse/" if place.is_dir() else "there is no such run"
    raise AssetError(
        f"{place}: {what}.",
        code="missing_file",
        remedy="give the output_dir of a training that ran with ModeCollapseCallback, or its collapse/history.jsonl.",
    )


def read_run(path: Path) -> Run:
    """The run whose history lies at `path`; it may still be written to.

    Raises:
        CollapseError: `history_file`, for what is no history or was written by another version.
    """
    from sft_plugins.collapse import read_history, summarise
    from sft_plugins.errors import CollapseError

    try:
        records = read_history(path)
        summary = summarise(records)
    except (KeyError, TypeError, AttributeError, IndexError, UnicodeDecodeError) as error:
        raise CollapseError(
            f"{path} is not the history of a run, or of another version: {type(error).__name__}: {error}",
            code="history_file",
            remedy="pass the history.jsonl that ModeCollapseCallback wrote; while a training writes to it, try again.",
        ) from error
    return Run(_name(path), path, summary, ended=records[-1]["kind"] == "end")


def page(runs: list[Run]) -> str:
    """The report of one run, or of several below a table of all."""
    from sft_plugins.cli.ui.pages import render_page
    from sft_plugins.collapse import page_context

    if len(runs) == 1:
        return render_page("collapse/report/report.html.j2", **page_context(runs[0].report))
    return render_page(
        "report.html.j2",
        runs=[{"name": run.name, **page_context(run.report)} for run in runs],
        rows=side_by_side(runs),
        words={status: words for status, (words, _) in VERDICTS.items()},
    )


def side_by_side(runs: list[Run]) -> list[dict[str, Any]]:
    """Rows `{title, values}` of one table, a value per run; "–" where a run did not measure it."""
    facts = [{**_facts(run), **_figures(run.report)} for run in runs]
    titles = dict.fromkeys(title for one in facts for title in one)
    return [{"title": title, "values": [one.get(title, "–") for one in facts]} for title in titles]


def _facts(run: Run) -> dict[str, str]:
    summary = run.report
    first = summary.first_alarm
    return {
        "Training": ("ended at" if run.ended else "running, or stopped, at") + f" step {summary.step}",
        "Variety kept": "–" if summary.kept is None else "{} ({} to {})".format(*summary.kept[1:]),
        "Last look": f"step {summary.looked_at}",
        "First alarm": "none" if first is None else f"step {first}",
        "Findings": ", ".join(_words(f["code"]) for f in summary.findings if f["level"] != "ok") or "none",
    }


def _figures(summary: Report) -> dict[str, str]:
    return {row["title"]: f"{row['base'] or '–'} → {row['now'] or '–'}" for row in summary.figures}


def _one(run: Run) -> list[RenderableType]:
    """Verdict, facts, findings and figures of one run."""
    summary = run.report
    words, style = VERDICTS[summary.status]
    facts = Table.grid(padding=(0, 2))
    for title, value in _facts(run).items():
        facts.add_row(Text(title, "bright_black"), Text(value))
    lines: list[RenderableType] = [Text.assemble((f" {words} ", style), " ", (run.name, "bold"))]
    lines += [Text(summary.headline, "bold"), facts, *_findings(summary)]
    if summary.figures:
        table = Table(title="Figures", title_justify="left")
        table.add_column("figure", overflow="fold")
        table.add_column("before", justify="right", no_wrap=True)
        table.add_column("now", justify="right", no_wrap=True)
        table.add_column("what it says", overflow="fold", style="bright_black")
        for row in summary.figures:
            table.add_row(row["title"], row["base"] or "–", row["now"] or "–", row["words"])
        lines.append(table)
    if summary.few_prompts is not None:
        words = (
            f"{summary.few_prompts} open prompts were asked; intervals of fewer than 16 hold less often than they say."
        )
        lines.append(Text(words, "yellow"))
    if summary.cost:
        lines.append(Text(f"Watching took {summary.cost['share']:.1%} of the training's wall time.", "bright_black"))
    return lines


def _several(runs: list[Run]) -> list[RenderableType]:
    """One table of all runs, a row each, and the findings of those that have any."""
    table = Table(title="Runs side by side", title_justify="left")
    table.add_column("run", overflow="fold")
    for title in ("verdict", "variety kept", "first alarm", "at step"):
        table.add_column(title, no_wrap=title == "verdict", overflow="fold")
    for run in runs:
        words, style = VERDICTS[run.report.status]
        facts = _facts(run)
        at = f"{run.report.step}" + ("" if run.ended else ", open")
        table.add_row(Text(run.name), Text(words, style), facts["Variety kept"], facts["First alarm"], at)
    figures = Table(title="Figures, before training → now", title_justify="left")
    figures.add_column("figure", overflow="fold")
    for run in runs:
        figures.add_column(Text(run.name), justify="right", overflow="fold")
    for row in side_by_side(runs)[len(_facts(runs[0])) :]:
        figures.add_row(row["title"], *row["values"])
    lines: list[RenderableType] = [table, figures]
    for run in runs:
        if found := _findings(run.report):
            lines += [Text(run.name, "bold"), *found]
    return lines


def _findings(summary: Report) -> list[Text]:
    lines = []
    for finding in summary.findings:
        lines.append(_finding(finding, finding["level"]))
    for finding in summary.pending:
        lines.append(_finding(finding, f"{finding['level']}, not confirmed yet"))
    for problem in summary.problems:
        lines.append(
            Text(f"· a look failed at step {problem['step']}, {problem['stage']}: {problem['message']}", "yellow")
        )
    return lines


def _finding(finding: dict[str, Any], level: str) -> Text:
    text = Text.assemble(
        (f"· {level}, {_words(finding['code'])}: ", _LEVELS.get(finding["level"], "")), f"{finding['evidence']}."
    )
    if finding.get("suggestion"):
        text.append(f" What to do: {finding['suggestion']}")
    return text


def _told_apart(runs: list[Run]) -> list[Run]:
    """Names without the folders that all of them lie in: `runs/a` and `runs/b` are `a` and `b`."""
    names = [Path(run.name).parts for run in runs]
    if len(runs) < 2:
        return runs
    same = next((i for i, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1), 0)
    return [replace(run, name=str(Path(*parts[same:]))) for run, parts in zip(runs, names, strict=True)]


def _words(code: str) -> str:
    return code.replace("_", " ")


def _name(path: Path) -> str:
    """The training's folder as it was given: `runs/a/collapse/history.jsonl` is `runs/a`."""
    folder = path.parent if path.name == HISTORY else path
    folder = folder.parent if folder.name == "collapse" and folder.parent != folder else folder
    return folder.resolve().name if str(folder) in ("", ".") else str(folder)
