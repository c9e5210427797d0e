"""One harness for all benchmarks: run them, keep what they found with where and when, and render the page in the docs.

    python tests/benchmarks/harness.py                    every bench_*.py, with its defaults
    python tests/benchmarks/harness.py planning packing   these alone
    python tests/benchmarks/harness.py step --rows 8192   one, with options of its own; with --add beside what its
                                                          earlier runs of the day found, not in its place
    python tests/benchmarks/harness.py --render           only write the pages anew from the results

A benchmark is a script `bench_<name>.py` that hands `script` its options and a function `measure(options) -> Measured`: records
(flat dictionaries, numbers with their unit in the name) and, by name, what was left out and why. Each runs in a process
of its own, and is written down as soon as it has finished; one that does not finish leaves what an earlier run found, and
the harness ends with an error. Results are JSON files in `results/`, one per date, machine and set of versions; `pages.py`
makes the pages of the docs from them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
PACKAGES = (
    *("torch", "transformers", "trl", "axolotl", "peft", "datasets", "accelerate", "numpy", "numba"),
    *("lightbinpack", "seqpacker"),
)

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
    """Wall seconds on a GPU; on a CPU `cpu_seconds`: what else the machine does does not count."""
    return time.perf_counter if device == "cuda" else cpu_seconds


def cpu_seconds() -> float:
    """Of this process, its threads and the processes it has waited for: under `num_proc=1` `datasets` maps in another."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def waiting(device: str) -> Callable[[], Any]:
    """What waits until the device has done what it was given."""
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def median_seconds(run: Callable[[], Any], repeats: int, *, device: str | None = None) -> float:
    """Median over `repeats` after one run that warms up, and compiles; by `clock_of(device)`, without a device wall seconds."""
    clock = time.perf_counter if device is None else clock_of(device)
    wait, times = waiting(device or "cpu"), []
    for _ in range(repeats + 1):
        wait()
        start = clock()
        run()
        wait()
        times.append(clock() - start)
    return statistics.median(times[1:])


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
    """Versions, machine and date; time, load and commit stand beside each benchmark: a file may be filled in several runs."""
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


def processor_seconds() -> tuple[float, float]:
    """CPU seconds of the whole machine so far (what a hypervisor gave to others included), and of this one's children."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, stolen = ticks
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
    return whole, children.ru_utime + children.ru_stime


def run(name: str, arguments: list[str], limit: float) -> dict[str, Any]:
    """What one benchmark found, in a process of its own; RuntimeError where it did not finish within `limit` seconds.

    `busy_elsewhere` says how many cores others kept busy meanwhile, on average: 0 on a quiet machine.
    """
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    start, (whole, children) = time.perf_counter(), processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, str(HERE / f"bench_{name}.py"), *arguments, "--json", str(out)]
        # A session of its own, so that what it started ends with it.
        process = subprocess.Popen(command, start_new_session=True)
        try:
            process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"not done in {limit:,.0f} s") from None
            raise
        if process.returncode or not out.exists():
            raise RuntimeError(f"ended with {process.returncode}")
        found: dict[str, Any] = json.loads(out.read_text())
    seconds = time.perf_counter() - start
    busy = [now - before for now, before in zip(processor_seconds(), (whole, children), strict=True)]
    return found | {
        "commit": commit.stdout.strip(),
        "at": at,
        "busy_elsewhere": round(max(0.0, busy[0] - busy[1]) / seconds, 2),
        "seconds": round(seconds, 1),
    }


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a fresh process: what one run leaves in memory, and in caches, is not the next one's.

    A worker that cannot start, or is killed for its memory, raises here; `multiprocessing.Pool` would wait for ever.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def file_of(around: dict[str, Any], folder: Path) -> Path:
    """`<date>-<cpu or gpu>[-axolotl][-2…].json`: the first that does not exist, or was filled in this environment."""
    kind = "gpu" if around["machine"]["gpu"] else "cpu"
    stem = f"{around['date']}-{kind}{'-axolotl' if 'axolotl' in around['versions'] else ''}"
    number = 1
    while True:
        path = folder / f"{stem}{f'-{number}' if number > 1 else ''}.json"
        if not path.exists() or json.loads(path.read_text())["environment"] == around:
            return path
        number += 1


def added(earlier: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Both runs' records; of two that differ in nothing but what was measured (words and arguments alike), the later."""

    def described(record: dict[str, Any]) -> dict[str, Any]:
        return {key: x for key, x in record.items() if isinstance(x, str) or key in found["arguments"]}

    again = [described(record) for record in found["records"]]
    kept = [record for record in earlier["records"] if described(record) not in again]
    return found | {"records": kept + found["records"], "skipped": earlier["skipped"] | found["skipped"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results, tests/benchmarks/results")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that one benchmark may take")
    parser.add_argument(
        "--add", action="store_true", help="keep the other records of today's earlier run of a benchmark"
    )
    parser.add_argument("--render", action="store_true", help="run nothing, write the pages anew")
    options, arguments = parser.parse_known_args()
    if arguments and len(options.names) != 1:
        parser.error(f"{' '.join(arguments)}: name the one benchmark whose options these are")
    if unknown := set(options.names) - set(known):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    failed = {}
    if not options.render:
        around = environment()
        options.results.mkdir(parents=True, exist_ok=True)
        out = file_of(around, options.results)
        for name in options.names or known:
            print(f"\n== {name}", flush=True)
            try:
                found = run(name, arguments, options.limit)
            except RuntimeError as error:
                failed[name] = str(error)
                continue
            earlier = json.loads(out.read_text())["benchmarks"] if out.exists() else {}
            if options.add and name in earlier:
                found = added(earlier[name], found)
            kept = {"environment": around, "benchmarks": earlier | {name: found}}
            out.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
            print(f"{found['seconds']:.0f} s; written: {out}")
    if options.results == RESULTS:  # a rehearsal's figures are kept off the pages
        import pages

        print("rendered:", *(str(page) for page in pages.write()))
    if failed:
        sys.exit(f"did not finish: {', '.join(f'{name} ({reason})' for name, reason in failed.items())}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # an exception, so that `run` ends what it started
    main()
