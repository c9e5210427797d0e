"""`sft-plugins demo` from the command line, on a tiny random model: every step runs, and every figure is this run's."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sft_plugins.cli import app
from sft_plugins.cli.demo.assets import load_model
from sft_plugins.cli.demo.demo import Settings, documents_of, run_demo
from sft_plugins.cli.demo.heldout import first_exchange, greedy_answer, held_out_loss
from sft_plugins.cli.demo.watching import SAFE_SENTENCE, same_answer_rows
from sft_plugins.cli.ui.inputs import check_writable
from sft_plugins.errors import AssetError
from testkit.commands import write_jsonl
from testkit.tiny_training import exchanges, save_tiny_llama
from testkit.tokenizers import build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 30 k parameters, and its tokenizer, as `save_pretrained` leaves them."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), **sizes)


@pytest.mark.slow
def test_demo_runs_from_the_command_line_and_leaves_an_adapter_that_peft_loads(folder: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    data, output = write_jsonl(tmp_path / "rows.jsonl", exchanges(24)), tmp_path / "out"
    options = ["--model", str(folder), "--data", str(data), "--steps", "6", "--output", str(output)]
    done = CliRunner().invoke(app, ["demo", *options, "--max-length", "64", "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said = done.output
    assert "[[trained]]" in said  # no terminal here, so brackets stand for colours
    assert re.search(r"\[\[(The answer is four\.|It is 21|I'm fine|Say it)", said)
    assert "((<|im_end|>))" in said
    assert "documents isolated, backend" in said
    assert "tokens/s" in said
    found = re.search(r"nats per supervised token[^\d]+([\d.]+)[^\d]+([\d.]+)", said.split("After training")[1])
    assert found
    before, after = map(float, found.groups())
    assert after < before
    tuned = AutoPeftModelForCausalLM.from_pretrained(str(output))
    assert any("lora" in name for name, _ in tuned.named_parameters())
    assert (output / "collapse" / "report.html").is_file()


@pytest.mark.slow
def test_demo_figures_are_those_of_the_saved_adapter(folder: Path, tmp_path: Path) -> None:
    """The outcome's losses, computed anew from what is on disk: the base gives "before", base and adapter "after"."""
    data = write_jsonl(tmp_path / "rows.jsonl", exchanges(24))
    settings = Settings(model=str(folder), data=data, steps=4, output=tmp_path / "out", max_length=64, device="cpu")
    outcome = run_demo(settings, console=Console(file=io.StringIO()))
    assert math.isclose(outcome.loss_reloaded, outcome.loss_after, rel_tol=1e-5)
    assert outcome.loss_after < outcome.loss_before
    assert outcome.tokens_per_second_packed > 0
    assert outcome.tokens_per_second_padded > 0


# --- the parts --------------------------------------------------------------------------------------------------------


def test_held_out_loss_is_the_mean_over_supervised_tokens_of_all_rows(folder: Path) -> None:
    model, _ = load_model(str(folder))
    data = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [9, 10, 11], "labels": [-100, 10, -100]},
    ]
    wanted = []
    for row in data:
        log_p = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        wanted += [-log_p[t - 1, x].item() for t, x in enumerate(row["labels"]) if x != -100]
    model.train()
    assert math.isclose(held_out_loss(model, data), sum(wanted) / 3, rel_tol=1e-5)
    assert model.training  # put back


def test_the_first_exchange_is_read_off_the_mask() -> None:
    tokenizer = build_tokenizer("bytelevel")
    prompt, answer, rest = (tokenizer(text)["input_ids"] for text in ("Q: hi A:", " fine, thanks<|im_end|>", "\nQ:"))
    row = {"input_ids": prompt + answer + rest, "labels": [-100] * len(prompt) + answer + [-100] * len(rest)}
    assert first_exchange(tokenizer, row) == (prompt, "fine, thanks")


def test_a_greedy_answer_says_when_it_was_cut(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    prompt = tokenizer("Hello")["input_ids"]
    assert greedy_answer(model, tokenizer, prompt, stops=[tokenizer.eos_token_id], most=3).endswith(" …")
    every_id = list(range(len(tokenizer)))
    assert not greedy_answer(model, tokenizer, prompt, stops=every_id, most=3).endswith("…")


def test_documents_are_cut_out_of_a_packed_row_where_they_begin() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, 5], "seq_lengths": [2, 3]}
    assert documents_of(row) == [
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]},
    ]


def test_collapse_data_answer_one_sentence_to_everything() -> None:
    made = same_answer_rows(exchanges(3))
    assert {m["content"] for row in made for m in row["messages"] if m["role"] == "assistant"} == {SAFE_SENTENCE}
    assert [row["messages"][0] for row in made] == [row["messages"][0] for row in exchanges(3)]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def fails(*options: str) -> str:
    """The output of a demo that must end with exit code 2 and a message, not a stack trace."""
    done = CliRunner().invoke(app, ["demo", *options])
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


def test_errors_are_printed_with_their_code_and_remedy(folder: Path, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "out"), "--model", str(folder)]
    missing = fails("--data", str(tmp_path / "none.jsonl"), *output)
    assert "error [missing_file]" in missing
    assert "what to do: give .jsonl, .json" in missing
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt"')
    assert "line 2, column" in fails("--data", str(tmp_path / "broken.jsonl"), *output)
    one = write_jsonl(tmp_path / "one.jsonl", exchanges(1) * 3)
    assert "give at least two different rows" in fails("--data", str(one), *output)
    assert "leave --data out" in fails("--collapse", "--data", str(one), *output)


def test_a_bad_row_is_named_by_its_place_in_the_file(folder: Path, tmp_path: Path) -> None:
    data = exchanges(40)
    data[23]["messages"][1]["content"] = ""
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    said = fails("--data", str(path), "--model", str(folder), "--output", str(tmp_path / "out"))
    assert "error [empty_response] (row 23)" in said


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    said = fails("--device", "cuda:77", "--output", str(tmp_path))
    assert "error [bad_device]" in said
    assert '"cpu"' in said


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match="cannot be written") as caught:
        check_writable(tmp_path / "file" / "out")
    assert caught.value.code == "unwritable"


def test_help_is_there_without_loading_torch() -> None:
    done = CliRunner().invoke(app, ["demo", "--help"])
    assert done.exit_code == 0
    for option in ("--model", "--data", "--steps", "--output", "--max-length", "--device", "--seed", "--collapse"):
        assert option in re.sub(r"\x1b\[[0-9;]*m", "", done.output)


def test_the_adapter_and_its_base_are_two_things(folder: Path) -> None:
    """A guard of the tests above: the tiny model loads as an ordinary one, without any adapter in it."""
    assert not any("lora" in name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters())
