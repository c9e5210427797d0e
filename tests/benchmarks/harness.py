"""One harness for all benchmarks: run them, keep what they found with where and when, and render the page in the docs.

    python tests/benchmarks/harness.py                    every bench_*.py, with its defaults
    python tests/benchmarks/harness.py planning packing   these alone
    python tests/benchmarks/harness.py step --rows 8192   one, with options of its own
    python tests/benchmarks/harness.py --render           only write docs/benchmarks.md anew from the results

A benchmark is a script `bench_<name>.py` that hands `script` its options and a function `measure(options) -> Measured`: records
(flat dictionaries, numbers with their unit in the name) and, by name, what was left out and why. Each runs in a process
of its own. Results are JSON files in `results/`; `benchmarks.md.j2` turns them into the page, and names what no file holds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, TEMPLATE, PAGE = HERE / "results", HERE / "benchmarks.md.j2", ROOT / "docs" / "benchmarks.md"
HOSTS = ("torch", "transformers", "trl", "axolotl")
PACKAGES = (*HOSTS, "peft", "datasets", "accelerate", "numpy", "numba", "lightbinpack", "seqpacker")
NOT_MEASURED = "not measured"

sys.path.insert(0, str(HERE.parent / "support"))  # testkit


@dataclass
class Measured:
    """What one benchmark found."""

    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """What was left out, and why."""


def script(
    description: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], Any],
    measure: Callable[[argparse.Namespace], Measured],
) -> None:
    """The command line of one benchmark: measures, prints a table, and writes `--json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--json", type=Path, help="write the records there")
    options = parser.parse_args()
    measured = measure(options)
    print(plain_table(measured.records))
    for name, reason in measured.skipped.items():
        print(f"skipped {name}: {reason}")
    if options.json:
        arguments = {name: value for name, value in vars(options).items() if name != "json"}
        found = {"arguments": arguments, "records": measured.records, "skipped": measured.skipped}
        options.json.write_text(json.dumps(found, indent=1, default=str))


def clock_of(device: str) -> Callable[[], float]:
    """Wall seconds on a GPU. On a CPU the process's own, of all its threads: what else the machine does does not count."""
    return time.perf_counter if device == "cuda" else time.process_time


def plain_table(records: list[dict[str, Any]]) -> str:
    """Records as text; a column per key, in the order in which they are first met."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    cells = [columns, *([_cell(record.get(column, "")) for column in columns] for record in records)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def environment() -> dict[str, Any]:
    """Versions, machine and date; load and commit stand beside each benchmark, since one file may be filled in several runs."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": versions,
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    import torch

    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    found: dict[str, Any] = {
        "cpu": f"{cpu} ({platform.machine()})",
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
        found |= {"gpu": device.name, "gpu_memory_gib": round(device.total_memory / 2**30, 1), "driver": driver[:1]}
    return found


def run(names: list[str], arguments: list[str]) -> dict[str, Any]:
    """Run the benchmarks one after another, each in its own process; what they found, with the load at their start."""
    found: dict[str, Any] = {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"\n== {name}", flush=True)
            out, load, start = Path(folder) / f"{name}.json", os.getloadavg()[0], time.perf_counter()
            done = subprocess.run([sys.executable, str(HERE / f"bench_{name}.py"), *arguments, "--json", str(out)])
            if done.returncode or not out.exists():
                found[name] = {"records": [], "skipped": {name: f"the script ended with {done.returncode}"}}
            else:
                found[name] = json.loads(out.read_text())
            seconds = round(time.perf_counter() - start, 1)
            found[name] |= {"commit": commit.stdout.strip(), "load_at_start": round(load, 2), "seconds": seconds}
    return found


def all_results() -> list[dict[str, Any]]:
    return [{"file": path.name, **json.loads(path.read_text())} for path in sorted(RESULTS.glob("*.json"))]


def latest(
    results: list[dict[str, Any]], name: str, *, gpu: bool = False, needs: str | None = None
) -> dict[str, Any] | None:
    """Newest result of benchmark `name` with records, on a GPU or not; of one day's, that of the quietest machine.

    `needs`: only results whose environment has this package.
    """
    fitting = [
        {**found["benchmarks"][name], "environment": found["environment"], "file": found["file"]}
        for found in results
        if found["benchmarks"].get(name, {}).get("records")
        and bool(found["environment"]["machine"].get("gpu")) == gpu
        and (needs is None or needs in found["environment"]["versions"])
    ]

    def rank(result: dict[str, Any]) -> tuple[str, bool, float]:
        load = result["load_at_start"]
        return result["environment"]["date"], load is not None, -(load or 0.0)

    return max(fitting, key=rank, default=None)


def render() -> str:
    """The page: `benchmarks.md.j2` over all committed results."""
    import jinja2

    results = all_results()
    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)

    def figure(result: dict[str, Any] | None, key: str, form: str = "{:.3g}", **where: Any) -> str:
        """One number of the one record that `where` describes; "not measured" where there is none."""
        records = [] if result is None else result["records"]
        fitting = [r for r in records if all(r.get(name) == value for name, value in where.items())]
        if len(fitting) > 1:
            raise ValueError(f"{len(fitting)} records fit {where}")
        value = fitting[0].get(key) if fitting else None
        return NOT_MEASURED if value is None else form.format(value)

    def times(result: dict[str, Any] | None, key: str, *, beside: dict[str, Any], **where: Any) -> str:
        """A record's figure ÷ that of the record that differs in `beside`, measured in the same run."""
        mine, other = figure(result, key, "{!r}", **where), figure(result, key, "{!r}", **where | beside)
        if NOT_MEASURED in (mine, other):
            return NOT_MEASURED
        ratio = float(mine) / float(other)
        return f"{ratio:,.0f}" if ratio >= 20 else f"{ratio:.2f}"

    def file_range(result: dict[str, Any], tokens: str, origin: str) -> str:
        """How many times as long as ours TRL took where ours wrote a file; a range where only that was written down."""
        where = {"tokens": tokens, "source": origin, "packer": "pack_dataset, to a file"}
        low, high = (figure(result, key, "{:.1f}", **where) for key in ("faster", "faster_high"))
        return f"{low} ×" if high == NOT_MEASURED else f"{low}–{high} ×"

    def source(result: dict[str, Any] | None) -> str:
        """Where and when, in one line."""
        if result is None:
            return f"*{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]} yet.*"
        e = result["environment"]
        m = e["machine"]
        versions = ", ".join(f"{name} {e['versions'][name]}" for name in HOSTS if name in e["versions"])
        busy = result["load_at_start"]
        load = "busy, load not noted" if busy is None else f"load {busy}" if busy else "quiet"
        return f"*{e['date']}, {m['gpu'] or m['cpu']}, {m['cores']} cores, {load}; {versions} (`{result['file']}`).*"

    page = jinja.from_string(TEMPLATE.read_text()).render(
        latest=lambda name, **options: latest(results, name, **options),
        figure=figure,
        times=times,
        records=lambda result: [] if result is None else result["records"],
        file_range=file_range,
        source=source,
        missing=NOT_MEASURED,
    )
    return page.rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--out", type=Path, help="by default results/<date>-<cpu or gpu>[-axolotl].json")
    parser.add_argument("--render", action="store_true", help="run nothing, write the page anew")
    options, arguments = parser.parse_known_args()
    if arguments and len(options.names) != 1:
        parser.error(f"{' '.join(arguments)}: name the one benchmark whose options these are")
    if unknown := set(options.names) - set(known):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if not options.render:
        around = environment()
        kind = "gpu" if around["machine"]["gpu"] else "cpu"
        host = "-axolotl" if "axolotl" in around["versions"] else ""
        out = options.out or RESULTS / f"{around['date']}-{kind}{host}.json"
        earlier = json.loads(out.read_text())["benchmarks"] if out.exists() else {}
        found = {"environment": around, "benchmarks": earlier | run(options.names or known, arguments)}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(f"\nwritten: {out}")
    PAGE.write_text(render())
    print(f"rendered: {PAGE}")
    if not options.render and (ended := [n for n in options.names or known if n in found["benchmarks"][n]["skipped"]]):
        sys.exit(f"did not finish: {', '.join(ended)}")


if __name__ == "__main__":
    main()
