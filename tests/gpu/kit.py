"""What a GPU machine without a package index lacks, packed where there is one, and the runs that it is for.

    python tests/gpu/kit.py pack                             here: .gpu-kit/site.tar.xz, for Python 3.12, at most 50 MiB
    python tests/gpu/kit.py run -P -m pytest -m gpu tests    there: Python with the kit on its path
    python tests/gpu/kit.py measure --output DIR             there: the tests, then every benchmark of the GPU path, with logs

The machine has torch with CUDA, transformers, PEFT, accelerate, pytest, hypothesis, numba, scipy, sacrebleu, rich and typer.
The kit has the rest in the versions of locks/trl.txt, and this tree, by links.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / ".gpu-kit"
LACKING = (
    "datasets", "pyarrow", "pandas", "multiprocess", "dill", "xxhash", "trl", "pydantic", "pydantic-core", "annotated-types",
    "typing-inspection", "gguf", "chitchat-dataset", "python-dateutil", "sentencepiece",
)  # fmt: skip
# Nothing here reads Arrow over a network, and tests and headers of others are half of what they weigh.
_LEFT_OUT = ("/tests/", "/include/", "/src/", "flight", "libarrow_s3", "_s3fs", ".pyi", ".pyx", ".pxd", "__pycache__")
MOST = 50 * 2**20
HARNESS = "tests/benchmarks/harness.py"
# `-P`: this folder's own sft_plugins lacks the integrations. In order of worth: time on such a machine is short.
STAGES: dict[str, list[str]] = {
    "tests": ["-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests"],
    "kernels": [HARNESS, "kernels"],
    "step": [HARNESS, "step"],
    "trees": [HARNESS, "trees"],
    "callback": [HARNESS, "callback"],
}


def pack() -> Path:
    """Download, trim and compress."""
    locked = dict(line.split("==") for line in (ROOT / "locks" / "trl.txt").read_text().splitlines() if "==" in line)
    site = KIT / "download"
    shutil.rmtree(site, ignore_errors=True)
    pins = [f"{name}=={locked[name]}" for name in LACKING]
    for_there = ["--python-version", "3.12", "--implementation", "cp", "--only-binary", ":all:"]
    platforms = [f"--platform={name}" for name in ("manylinux_2_28_x86_64", "manylinux2014_x86_64")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([*pip, *for_there, *platforms, *pins], check=True)
    packed = KIT / "site.tar.xz"
    with tarfile.open(packed, "w:xz") as archive:
        for path in sorted(site.rglob("*")):
            name = str(path.relative_to(site))
            if path.is_file() and not any(part in f"/{name}" for part in _LEFT_OUT):
                archive.add(path, name)
    shutil.rmtree(site)
    if packed.stat().st_size > MOST:
        sys.exit(f"{packed} has {packed.stat().st_size / 2**20:.0f} MiB, at most {MOST / 2**20:.0f} can travel")
    return packed


def environment() -> dict[str, str]:
    """The kit unpacked, and the path that has it; `sft_plugins.integrations` lies beside the core, so links bring it in."""
    # dill pickles modules outside of a folder of this name by value, and fails.
    site, own = KIT / "site-packages", KIT / "own"
    if not site.is_dir():
        with tarfile.open(KIT / "site.tar.xz") as archive:
            archive.extractall(site, filter="data")
    shutil.rmtree(own, ignore_errors=True)
    (own / "sft_plugins").mkdir(parents=True)
    for path in (*(ROOT / "sft_plugins").iterdir(), ROOT / "integrations"):
        (own / "sft_plugins" / path.name).symlink_to(path)
    path = os.pathsep.join([str(own), str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matrix products, for the bit-identity tests
    }


def measure(output: Path, stages: list[str], device: str, limit: float) -> int:
    """Run each stage, whatever became of those before it, until `limit` seconds are over. Returns how many did not end well."""
    output.mkdir(parents=True, exist_ok=True)
    around, began, failed = environment() | {"SFT_PLUGINS_TEST_DEVICE": device}, time.monotonic(), 0
    for name in stages:
        left = limit - (time.monotonic() - began)
        more = [] if name == "tests" else ["--device", device, "--results", str(output)]
        started, log = time.monotonic(), output / f"{name}.log"
        with log.open("w") as out:
            command = [sys.executable, *STAGES[name], *more]
            running = subprocess.Popen(command, cwd=ROOT, env=around, stdout=out, stderr=out, start_new_session=True)
            try:
                code = running.wait(timeout=max(left, 1))
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGTERM)  # with what it started, which would slow the next stage
                code = running.wait()
        failed += code != 0
        told = log.read_text(errors="replace").strip().splitlines()
        print(
            f"{name}: {'ran' if code == 0 else 'failed'} in {time.monotonic() - started:.0f} s; {told[-1] if told else ''}",
            flush=True,
        )
    return failed


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        os.execve(sys.executable, [sys.executable, *sys.argv[2:]], environment())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pack")
    measuring = commands.add_parser("measure")
    measuring.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", KIT / "out")))
    measuring.add_argument("--device", default="cuda")
    measuring.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES))
    measuring.add_argument("--limit", type=float, default=570, help="seconds for everything")
    options = parser.parse_args()
    if options.command == "pack":
        packed = pack()
        print(f"{packed}: {packed.stat().st_size / 2**20:.0f} MiB")
    else:
        sys.exit(measure(options.output, options.stages, options.device, options.limit))


if __name__ == "__main__":
    main()
