"""The pages of the docs that hold measured figures: each is what its template makes of the JSON files in `results/`.

`docs/benchmarks.md` comes from `benchmarks.md.j2`, `docs/scale.md` from `scale.md.j2`; a test holds both to it. What no
file holds reads "not measured".
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from harness import HERE, RESULTS, ROOT

PAGES = {ROOT / "docs" / name: HERE / f"{name}.j2" for name in ("benchmarks.md", "scale.md")}
HOSTS = ("torch", "transformers", "trl", "axolotl")
NOT_MEASURED = "not measured"

Result = dict[str, Any]


def all_results(folder: Path = RESULTS) -> list[Result]:
    return [{"file": path.name, **json.loads(path.read_text())} for path in sorted(folder.glob("*.json"))]


def latest(
    results: list[Result],
    name: str,
    *,
    gpu: bool = False,
    needs: str | None = None,
    lacks: str | None = None,
    holding: dict[str, Any] | None = None,
) -> Result | None:
    """Newest result of benchmark `name` with records, on a GPU or not; of one day's without a time, the least loaded.

    `needs`, `lacks`: only results whose environment has, or has not, this package; `holding`: only those with such a record.
    """
    fitting = [
        {**found["benchmarks"][name], "environment": found["environment"], "file": found["file"]}
        for found in results
        if found["benchmarks"].get(name, {}).get("records")
        and bool(found["environment"]["machine"].get("gpu")) == gpu
        and (needs is None or needs in found["environment"]["versions"])
        and (lacks is None or lacks not in found["environment"]["versions"])
        and any((holding or {}).items() <= r.items() for r in found["benchmarks"][name]["records"])
    ]

    def rank(result: Result) -> tuple[str, str, bool, float]:
        load = result.get("load_at_start")
        return result["environment"]["date"], result.get("at", ""), load is not None, -(load or 0.0)

    return max(fitting, key=rank, default=None)


def record(result: Result | None, **where: Any) -> dict[str, Any]:
    """The one record that `where` describes; empty where there is none."""
    records = [] if result is None else result["records"]
    fitting = [r for r in records if all(r.get(name) == value for name, value in where.items())]
    if len(fitting) > 1:
        raise ValueError(f"{len(fitting)} records fit {where}")
    return fitting[0] if fitting else {}


def figure(result: Result | None, key: str, form: str = "{:.3g}", **where: Any) -> str:
    """One number of the one record that `where` describes."""
    value = record(result, **where).get(key)
    return NOT_MEASURED if value is None else form.format(value)


def largest(result: Result | None, what: str, below: float = math.inf) -> dict[str, Any]:
    """The record of `what` with the largest `n` below `below`; empty where there is none."""
    fitting = [r for r in (result or {}).get("records", []) if r["what"] == what and r["n"] < below]
    return max(fitting, key=lambda r: r["n"], default={})


def times(result: Result | None, key: str, *, beside: dict[str, Any], **where: Any) -> str:
    """A record's figure ÷ that of the record that differs in `beside`, measured in the same run."""
    mine, other = record(result, **where).get(key), record(result, **where | beside).get(key)
    if mine is None or other is None:
        return NOT_MEASURED
    ratio = mine / other
    return f"{ratio:,.0f}" if ratio >= 20 else f"{ratio:.2f}"


def source(result: Result | None) -> str:
    """Where and when, in one line."""
    if result is None:
        return f"*{NOT_MEASURED.capitalize()} yet.*"
    e = result["environment"]
    m = e["machine"]
    versions = ", ".join(f"{name} {e['versions'][name]}" for name in HOSTS if name in e["versions"])
    if "busy_elsewhere" in result:
        load = f"{result['busy_elsewhere']:.2f} of them busy with other work"
    else:
        busy = result["load_at_start"]
        load = "busy, load not noted" if busy is None else f"load {busy}" if busy else "quiet"
    return f"*{e['date']}, {m['gpu'] or m['cpu']}, {m['cores']} cores, {load}; {versions} (`{result['file']}`).*"


def render(template: Path, results: list[Result]) -> str:
    import jinja2

    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = jinja.from_string(template.read_text()).render(
        latest=lambda name, **options: latest(results, name, **options),
        record=record,
        figure=figure,
        largest=largest,
        log10=math.log10,
        times=times,
        records=lambda result: [] if result is None else result["records"],
        source=source,
        missing=NOT_MEASURED,
    )
    return page.rstrip() + "\n"


def write() -> list[Path]:
    """Every page, written anew."""
    results = all_results()
    for page, template in PAGES.items():
        page.write_text(render(template, results))
    return list(PAGES)
