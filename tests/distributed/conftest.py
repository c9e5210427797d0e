"""`launch(worker, processes, folder)`: a script of this folder under `torchrun`, on the CPU (gloo), one thread each.

A worker writes `rank<r>.json` into its folder; what the ranks wrote comes back as a list. Workers are processes of their
own, since a process group, once made, stays.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testkit.patience import HANGS

HERE = Path(__file__).parent
Launch = Callable[..., list[dict[str, Any]]]


def environment() -> dict[str, str]:
    support = f"{HERE.parent / 'support'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    ours = {
        "PYTHONPATH": support,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **ours}


@pytest.fixture(scope="session")
def cpu_environment() -> dict[str, str]:
    return environment()


@pytest.fixture(scope="session")
def launch() -> Launch:
    def run(worker: str, processes: int, folder: Path, *arguments: str) -> list[dict[str, Any]]:
        folder.mkdir(parents=True, exist_ok=True)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [*torchrun, str(HERE / worker), str(folder), *arguments],
            cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=HANGS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]

    return run
