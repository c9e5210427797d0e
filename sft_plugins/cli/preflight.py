"""`sft-plugins preflight`: one page on what a configuration is going to train, in the terminal and as HTML."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sft_plugins.cli.ui import options
from sft_plugins.cli.ui.command import add_command
from sft_plugins.cli.ui.output import EXIT_FINDINGS, EXIT_OK, Output

if TYPE_CHECKING:
    from sft_plugins.preflight import Finding, Verdict

_EPILOG = (
    "Examples: sft-plugins preflight axolotl.yaml | sft-plugins preflight trl.yaml --model ./model --data rows.jsonl | "
    "sft-plugins preflight trl.yaml --components --reasoning inline --html preflight.html. "
    "Exit codes: 0 green or amber, 1 red, 2 unusable input."
)
WORDS = {
    "green": "nothing stands against this run in what was checked",
    "amber": "look at this before you train",
    "red": "do not train this",
}
STYLES = {"green": "bold green", "amber": "bold yellow", "red": "bold red"}
MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "note": ("·", "bright_black")}
TITLES = {"config": "Configuration", "data": "Data", "masking": "Masking", "packing": "Packing"}


def register(app: typer.Typer) -> None:
    add_command(app, preflight, epilog=_EPILOG)


def preflight(
    out: Output,
    *,
    config: Annotated[Path, typer.Argument(help="An Axolotl YAML, or a YAML or JSON file of TRL's arguments.")],
    model: Annotated[str | None, typer.Option(help="In place of the configuration's: a folder or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="In place of the configuration's: a file or a folder.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices that the run will use; for the number of steps.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at the first rows of each source only.")] = None,
    components: Annotated[
        bool, typer.Option("--components", help="Judge the run as it would be with sft-plugins' masking and packing.")
    ] = False,
    overflow: options.OVERFLOW = "raise",
    masking: options.Masking,
    html: Annotated[Path | None, typer.Option(help="Write the verdict as a page to this file too.")] = None,
) -> int:
    """See what will be trained, and catch known failures, before a GPU hour is spent."""
    from sft_plugins.cli.ui.pages import render_page, write_page
    from sft_plugins.integrations import Overrides, read_plan
    from sft_plugins.preflight import PARTS, colour, run_preflight

    # What is not given is as the configuration has it.
    given = masking.given() | ({} if overflow == "raise" else {"overflow": overflow})
    plan = read_plan(config, Overrides(model=model, data=data, devices=devices, components=components, masking=given))
    with out.progress.status("reading") as status:
        done: dict[str, int] = {}

        def progress(stage: str, rows: int) -> None:
            done[stage] = done.get(stage, 0) + rows
            status.update(f"{stage}: {done[stage]:,} rows" if done[stage] else stage)

        verdict = run_preflight(plan, limit=limit, progress=progress)
    show(verdict, out)
    if html is not None:
        colours = {part: colour(verdict.of(part)) for part in PARTS}
        page = render_page(
            "preflight.html.j2", verdict=verdict, words=WORDS, titles=TITLES, facts=facts(verdict), colours=colours
        )
        write_page(html, page)
    out.emit({"command": "preflight", **verdict.to_dict()})
    return EXIT_FINDINGS if verdict.colour == "red" else EXIT_OK


def facts(verdict: Verdict) -> dict[str, str]:
    """One line per part: what was looked at, and what it came to."""
    plan, cost = verdict.plan, verdict.cost
    rows = sum(e.report.rows_in for e in verdict.entries if e.report is not None)
    forms = ", ".join(dict.fromkeys(entry.format for entry in verdict.entries))
    lines = {
        "config": f"{plan.host}, {plan.model}",
        "data": f"{rows:,} rows ({forms})" if verdict.entries else "not read",
        "masking": "; ".join(
            f"{e.entry.where}: {e.report.supervised_share:.1%} of {e.report.tokens:,} tokens are answers"
            + (", and all carry loss" if any(f.code == "prompts_trained" for f in e.findings) else "")
            for e in verdict.entries
            if e.report is not None
        )
        or _unmasked(verdict),
        "packing": "off",
    }
    if plan.packer is not None:
        lines["packing"] = "by sft-plugins" if plan.packer == "sft_plugins" else f"by {plan.host}"
        if verdict.packing is not None:
            lines["packing"] += f": {verdict.packing.rows:,} rows, {verdict.packing.fill:.1%} full"
    if cost is not None:
        more = f", {cost.dropped:,} rows left out" if cost.dropped else ""
        padding = cost.computed_tokens - cost.tokens
        lines["cost"] = (
            f"one epoch: {cost.tokens:,} tokens, {cost.supervised_tokens:,} of them answers, and {padding:,} of padding; "
            f"{cost.epochs:g} × {cost.rows:,} rows, {cost.rows_per_step:,} to a step: {cost.steps:,} steps"
            + (" (max_steps)" if plan.max_steps is not None else "")
            + more
        )
    return lines


def _unmasked(verdict: Verdict) -> str:
    """What stands in the place of masks where none was made."""
    if not verdict.entries or not all(entry.entry.text_field for entry in verdict.entries):
        return "not judged"
    return "finished text: every token carries loss"


def show(verdict: Verdict, out: Output) -> None:
    """The verdict for a terminal: colour, one line per part, the findings below."""
    from sft_plugins.preflight import PARTS, colour

    console = out.console
    lines = facts(verdict)
    title = Text.assemble((f"{verdict.colour.upper()}", STYLES[verdict.colour]), f": {WORDS[verdict.colour]}")
    console.print(Text(str(verdict.plan.path), style="bold"), title, sep="\n")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for part in PARTS:
        shade = colour(verdict.of(part))
        table.add_row(Text(shade, style=STYLES[shade]), TITLES[part], Text(lines[part]))
    if "cost" in lines:
        table.add_row("", "Cost", Text(lines["cost"]))
    console.print(table)
    for part in PARTS:
        for finding in verdict.of(part):
            _show(finding, console)
    console.print()
    console.print(Text.assemble(("Not checked: ", "bold"), f"{'; '.join(verdict.not_checked)}."))
    console.print(Text(f"{verdict.seconds:.0f} s", style="bright_black"))


def _show(finding: Finding, console: Any) -> None:
    mark, style = MARKS[finding.level]
    rows = f" in {finding.places}" if finding.places else ""
    console.print()
    console.print(
        Text.assemble(
            (f"{mark} {finding.code}", style), (f" {finding.failure}" if finding.failure else "", "bright_black"), rows,
            (f"  {finding.where}", "bright_black"),
        )
    )  # fmt: skip
    console.print(Padding(Text(finding.message), (0, 0, 0, 2)))
    if finding.remedy:
        console.print(Padding(Text.assemble(("→ ", style), finding.remedy), (0, 0, 0, 2)))
