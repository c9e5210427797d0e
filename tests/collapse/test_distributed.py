"""Two gloo processes give the same figures as one, and a failure in one of them does not leave the other waiting (C9)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_plugins.collapse.distributed import ProbeError, Ranks
from testkit.patience import HANGS

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from testkit.ranks import leave_process_group
from testkit.watched_runs import OPTIONS, PROMPTS, added_records, byte_tokenizer, fake_embedder, rows, tiny_model, train
from sft_plugins.collapse.probe import probe
from sft_plugins.collapse.callback import ModeCollapseCallback

if __name__ == "__main__":
    out, fail, batch = Path(sys.argv[1]), sys.argv[2] == "fail", int(sys.argv[3])
    watch = ModeCollapseCallback(
        byte_tokenizer(), PROMPTS, eval_pairs=rows(5), every_steps=2, embedder=fake_embedder, output_dir=out / "w",
        **{**OPTIONS, "max_new_tokens": 6},
    )
    own = probe.Prober._batches
    probe.Prober._batches = lambda self, k: (setattr(self, "max_rows", 5), own(self, k))[1]
    if fail:
        answer = probe.sample_batch

        def broken(*args, **kwargs):
            if watch._active and torch.distributed.get_rank() == 1:
                raise RuntimeError("only here")
            return answer(*args, **kwargs)

        probe.sample_batch = broken
    trainer = train(
        tiny_model(dropout=0.0), out / "run", callbacks=[watch], max_steps=2, per_device_train_batch_size=batch,
        learning_rate=0.0,
    )
    rank = trainer.args.process_index
    found = {"records": added_records(trainer), "steps": trainer.state.global_step, "world": trainer.args.world_size}
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    leave_process_group()
"""


def launch(folder: Path, processes: int, *, fail: bool = False) -> list[dict[str, Any]]:
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    support = Path(__file__).parents[1] / "support"
    common = {
        **os.environ,
        "PYTHONPATH": f"{support}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    ranks = []
    for rank in range(processes):
        world = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        } if processes > 1 else {}  # fmt: skip
        command = [sys.executable, str(script), str(folder), "fail" if fail else "", str(4 // processes)]
        ranks.append(
            subprocess.Popen(
                command, env={**common, **world}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        for process in ranks:
            out, _ = process.communicate(timeout=HANGS)
            assert process.returncode == 0, out[-3000:]
    finally:
        for process in ranks:
            process.kill()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


def history(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "w" / "history.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path: Path) -> None:
    (one,) = launch(tmp_path / "one", 1)
    two = launch(tmp_path / "two", 2)
    assert [r["world"] for r in two] == [2, 2]
    assert two[0]["records"] == two[1]["records"], "every rank logs the same"
    assert len(one["records"]) == 2
    for a, b in zip(one["records"], two[0]["records"], strict=True):
        assert {k: v for k, v in a.items() if k != "epoch"} == {k: v for k, v in b.items() if k != "epoch"}
    for a, b in zip(history(tmp_path / "one", "probe"), history(tmp_path / "two", "probe"), strict=True):
        assert a["samples"] == b["samples"]
        assert a["fork_entropy"] == b["fork_entropy"]
        assert a["verdict"] == b["verdict"]
    assert len(history(tmp_path / "two", "run")) == 1, "rank 0 alone writes"


@pytest.mark.slow
def test_a_failure_in_one_process_ends_the_probe_in_both_and_training_goes_on(tmp_path: Path) -> None:
    """C9: the other rank must not wait for ever, and both train to the end."""
    ranks = launch(tmp_path / "run", 2, fail=True)
    assert [r["steps"] for r in ranks] == [2, 2]
    assert [len(r["records"]) for r in ranks] == [1, 1], "the baseline's record only"
    (problem,) = history(tmp_path / "run", "problem")
    assert "rank 1: RuntimeError: only here" in problem["message"]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_batch_is_done_once_and_every_rank_calls_equally_often(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks simulated one round at a time: what each would contribute is what `share` returns."""
    batches = list(range(5))
    calls = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        done: list[int] = []

        def share(value: Any, rank: int = rank, done: list[int] = done) -> list[Any]:
            first = (len(done) - 1) * size
            return [(min(first + r, 4) * 10, None) if r != rank else value for r in range(size)]

        monkeypatch.setattr(ranks, "share", share)
        assert ranks.deal(batches, lambda b, done=done: done.append(b) or b * 10) == [0, 10, 20, 30, 40]
        calls.append(len(done))
    assert len(set(calls)) == 1
    assert calls[0] == -(-5 // size)


def test_a_failure_elsewhere_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks()
    ranks.size = 2
    monkeypatch.setattr(ranks, "share", lambda value: [value, (None, ("RuntimeError: CUDA out of memory", True))])
    with pytest.raises(ProbeError, match="rank 1: RuntimeError") as caught:
        ranks.together(lambda: 1)
    assert caught.value.out_of_memory
