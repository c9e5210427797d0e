"""The part of `docs/testing.md` that results write: figures by package, and every survivor with what it would change."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from declared import change, entries, equivalent

BEGIN, END = "<!-- written by make mutants ARGS=--page -->\n", "<!-- end -->\n"
NOTICED = ("killed", "time")
Result = dict[str, Any]


def write(root: Path, results: list[Result]) -> None:
    page = root / "docs" / "testing.md"
    page.write_text(rendered(page.read_text(encoding="utf-8"), results), encoding="utf-8")


def rendered(page: str, results: list[Result]) -> str:
    """`page` with its written part anew. Faults that were declared to change nothing since count no more."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    counted = [result for result in results if equivalent(result) is None]
    return before + BEGIN + "\n" + _figures(counted) + "\n" + _survivors(counted) + "\n" + END + after


def _figures(results: list[Result]) -> str:
    planted, noticed = Counter(map(_package, results)), Counter(_package(r) for r in results if r["outcome"] in NOTICED)
    lines = ["| package | planted | noticed | survived | noticed, % |", "| --- | --- | --- | --- | --- |"]
    for name in [*sorted(planted), "all"]:
        total, seen = (planted[name], noticed[name]) if name != "all" else (planted.total(), noticed.total())
        lines.append(f"| {name} | {total} | {seen} | {total - seen} | {100 * seen / max(total, 1):.0f} |")
    dates = sorted({result["date"] for result in results})
    with_ = sorted({", ".join(f"{name} {v}" for name, v in result["versions"].items()) for result in results})
    told = f"Taken {dates[0]} to {dates[-1]}, with {'; '.join(with_)}. " if results else "Not taken yet. "
    return "\n".join(lines) + f"\n\n{told}{len(entries('equivalents.yaml'))} faults are declared to change nothing.\n"


def _survivors(results: list[Result]) -> str:
    lines = ["| survivor | was | is | would change |", "| --- | --- | --- | --- |"]
    for result in sorted(results, key=lambda result: (result["file"], result["line"])):
        if result["outcome"] not in NOTICED:
            said = change(result) or (
                "not looked at yet" + ("; its tests were not all run" if result.get("cut") else "")
            )
            lines.append(
                f"| `{result['file']}:{result['line']}` | {_code(result['was'])} | {_code(result['is'])} | {said} |"
            )
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    short = " ".join(text.split())
    return "`" + (short if len(short) <= 60 else f"{short[:57]}…").replace("|", "\\|") + "`" if short else "nothing"


def _package(result: Result) -> str:
    top, _, rest = result["file"].partition("/")
    return rest.split("/")[0] if top == "sft_plugins" else top
