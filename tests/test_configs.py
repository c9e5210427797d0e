"""Every script of `configs/` runs as it stands, on a tiny model, for a few steps, and leaves an adapter."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from testkit.commands import write_jsonl
from testkit.tiny_training import exchanges, save_tiny_llama

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SCRIPTS = {
    "trl_masking.py": [],
    "trl_on_the_fly.py": [],
    "trl_packing.py": [],
    "trl_collapse.py": ["--samples", "2", "--new-tokens", "4"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", exchanges(40))


def test_every_trl_script_is_listed_here() -> None:
    assert {path.name for path in CONFIGS.glob("trl_*.py")} == set(SCRIPTS)
    # What other hosts load runs in tests/integrations, with them.
    assert {path.name for path in CONFIGS.glob("*.py")} - set(SCRIPTS) == {"swift_plugin.py", "verl_rows.py"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_trains_and_saves_an_adapter(
    name: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("trl", reason="the scripts train with TRL")
    output = tmp_path / "out"
    options = [
        "--model",
        str(model),
        "--data",
        str(data),
        "--output",
        str(output),
        "--steps",
        "2",
        "--max-length",
        "64",
    ]
    if name == "trl_collapse.py":
        prompts = [{"prompt": f"Say {word}."} for word in ("one", "two", "four", "six")]
        options += ["--prompts", str(write_jsonl(tmp_path / "prompts.jsonl", prompts))]
    monkeypatch.setattr(sys, "argv", [name, *options, *SCRIPTS[name]])
    monkeypatch.chdir(tmp_path)
    ran = runpy.run_path(str(CONFIGS / name), run_name="__main__")
    assert f"adapter saved to {output}" in capsys.readouterr().out
    assert (output / "adapter_model.safetensors").is_file()
    losses = [entry["loss"] for entry in ran["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
