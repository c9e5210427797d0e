"""Axolotl's own commands with the plug-in present, on CPU, offline, on a tiny model with LoRA.

All runs happen one after the other in one process (`drive_axolotl.py`), which is itself a test: nothing may be left over.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl", reason="the Axolotl plug-in runs in Axolotl's environment")

import yaml
from transformers import LlamaForCausalLM

from sft_plugins.masking import PromptMasker
from testkit.axolotl_plan import (
    ALIKE,
    BASE,
    CONVERSATIONS,
    EMPTY_ANSWERS,
    OTHER_NAMES,
    PLAN,
    STRATEGY,
    environment,
    save_model,
    tiny_tokenizer,
    write_rows,
)
from testkit.prefix_forest import trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("axolotl")
    save_model(folder / "model")
    write_rows(folder / "rows.jsonl", CONVERSATIONS)
    write_rows(folder / "other.jsonl", OTHER_NAMES)
    write_rows(folder / "alike.jsonl", ALIKE)
    write_rows(folder / "empty.jsonl", EMPTY_ANSWERS)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"Say {word}."} for word in ("one", "two", "four", "six")])
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    plan = []
    for name, (command, changes) in PLAN.items():
        slug = name.replace(" ", "_").replace(",", "")
        config = {"output_dir": f"out/{slug}", "dataset_prepared_path": f"prepared/{slug}", **BASE, **changes}
        path = folder / f"{slug}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        plan.append([name, command, str(path)])
    (folder / "plan.json").write_text(json.dumps(plan))
    driver = Path(__file__).with_name("drive_axolotl.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(folder / "plan.json"), str(folder / "seen.json")],
        cwd=folder, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((folder / "seen.json").read_text())


def oracle(conversations: list[dict[str, Any]] = CONVERSATIONS, **options: Any) -> list[list[list[int]]]:
    """`[ids, labels]` of every row, as `PromptMasker` itself gives them."""
    masker = PromptMasker(tiny_tokenizer(), **options)
    return [[row.input_ids, row.labels] for example in conversations for row in masker.encode(example)]


def unpacked(rows: list[dict[str, Any]]) -> list[list[list[int]]]:
    """The documents of packed rows."""
    found = []
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            found.append([row["input_ids"][start : start + length], row["labels"][start : start + length]])
            start += length
    return found


def documents(look: dict[str, Any]) -> list[list[list[int]]]:
    return [document for batch in look["batches"] for document in batch]


def succeeded(run: dict[str, Any]) -> dict[str, Any]:
    assert run["error"] is None, run["traceback"]
    return run


TRAINED = {
    "packed": "BlockDiagonalPackingCollator",
    "padded": "StrictPromptMaskingCollator",
    "multipack": "BlockDiagonalPackingCollator",
}


@pytest.mark.parametrize("name", TRAINED)
def test_the_live_dataloader_collates_with_ours(runs: dict[str, Any], name: str) -> None:
    """P13, and P11 for evaluation."""
    run = succeeded(runs[name])
    assert run["train"]["collator"] == TRAINED[name]
    assert run["evaluation"]["collator"] == TRAINED[name]
    assert ("attention_mask" in run["train"]["keys"]) == (name == "padded")


@pytest.mark.parametrize("name", TRAINED)
def test_masks_in_the_batches_are_those_of_the_masker(runs: dict[str, Any], name: str) -> None:
    run = succeeded(runs[name])
    trained, held_out = documents(run["train"]), documents(run["evaluation"])
    expected = oracle()
    if name == "multipack":  # Axolotl's sampler drops a last batch that is not full
        assert len(trained) > 10
        assert all(document in expected for document in trained + held_out)
    else:
        assert sorted(trained + held_out) == sorted(expected)
        assert sorted(held_out) == sorted(expected[-4:])


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("phase", ["train", "evaluation"])
def test_the_loss_of_a_batch_is_that_of_its_documents_alone(runs: dict[str, Any], name: str, phase: str) -> None:
    look = succeeded(runs[name])[phase]
    assert look["together"] == pytest.approx(look["alone"], rel=1e-5)


@pytest.mark.parametrize("name", ["packed", "multipack"])
def test_the_comparison_above_sees_documents_that_see_one_another(runs: dict[str, Any], name: str) -> None:
    """P2, planted: the same rows with their boundaries withheld."""
    look = succeeded(runs[name])["train"]
    assert abs(look["as one"] - look["alone"]) > 1e-3 * look["alone"], "a hundred times what is allowed above"


def test_packed_loss_equals_padded_loss(runs: dict[str, Any]) -> None:
    """The same model over the same rows, by the token."""
    packed, padded = runs["packed"]["train"], runs["padded"]["train"]
    assert packed["together"] == pytest.approx(padded["together"], rel=1e-5)


@pytest.mark.parametrize("phase", ["train", "evaluation"])
def test_trees_train_what_their_rows_train(runs: dict[str, Any], phase: str) -> None:
    """`share_prefixes: true` in the YAML: every trained token once, behind what stands before it, at the loss of its row."""
    look = succeeded(runs["trees"])[phase]
    assert "seq_parents" in look["keys"]
    assert look["together"] == pytest.approx(look["alone"], rel=1e-5)
    rows = oracle(ALIKE)
    expected = rows[:-4] if phase == "train" else rows[-4:]
    assert trained((ids, labels) for ids, labels in documents(look)) == trained(
        (ids, labels) for ids, labels in expected
    )


def test_steps_are_counted_over_packed_rows(runs: dict[str, Any]) -> None:
    run = succeeded(runs["packed"])
    rows = run["rows"]
    assert rows < 20
    assert run["steps"] == run["max_steps"] == -(-rows // 2)
    assert runs["padded"]["steps"] == 10


def test_the_log_says_once_what_is_active(runs: dict[str, Any]) -> None:
    log = succeeded(runs["packed"])["log"]
    assert log.count(" is active: ") == 1
    assert (
        "is active: masking (1 of 1 datasets masked here, audit: error), packing (rows of 96 tokens, packed here), "
        "collapse (on_collapse: warn)" in log
    )
    assert "sft-plugins isolation proved: LlamaForCausalLM (float32, cpu): documents isolated, backend varlen" in log
    assert "sft-plugins packed the train rows: 20 documents in" in log
    assert "packing off" in runs["padded"]["log"]
    assert "isolation proved" not in runs["padded"]["log"]
    assert "packing (Axolotl's sample_packing, isolated here)" in runs["multipack"]["log"]


def test_collapse_figures_reach_the_loggers_and_the_history(runs: dict[str, Any], folder: Path) -> None:
    run = succeeded(runs["packed"])
    logged = [record for record in run["history"] if any(name.startswith("collapse/") for name in record)]
    assert len(logged) >= 3
    assert all("collapse/heldout_loss" in record for record in logged)
    assert run["callbacks"].count("AxolotlCollapseCallback") == 1
    assert list((folder / "out" / "packed" / "collapse").glob("*.jsonl"))
    losses = [record["loss"] for record in run["history"] if "loss" in record]
    assert len(losses) == run["steps"], "the trainer's own records are all there"
    assert "AxolotlCollapseCallback" not in runs["padded"]["callbacks"]


def test_a_second_plugin_works_beside_ours(runs: dict[str, Any]) -> None:
    assert "GrokfastCallbackHandler" in succeeded(runs["padded"])["callbacks"]


def test_a_later_run_without_the_plugin_has_nothing_of_it(runs: dict[str, Any]) -> None:
    run = succeeded(runs["without the plug-in"])
    assert run["train"]["collator"] not in TRAINED.values()
    assert "sft-plugins" not in run["log"]
    assert run["attention"] == "sdpa"
    assert "sft_plugins-" not in run["prepared_path"]


def test_preprocess_prepares_what_training_then_loads(runs: dict[str, Any], folder: Path) -> None:
    succeeded(runs["preprocess"])
    run = succeeded(runs["after preprocess"])
    assert "Loading prepared dataset from disk" in run["log"]
    assert "sft-plugins masked a dataset" not in run["log"]
    assert sorted(unpacked(run["rows"])) == sorted(oracle()[:-4])


def test_prepared_data_never_serve_stale_masks(runs: dict[str, Any]) -> None:
    run = succeeded(runs["other masks, same folder"])
    assert run["prepared_path"] != runs["after preprocess"]["prepared_path"]
    assert Path(run["prepared_path"]).parent == Path(runs["after preprocess"]["prepared_path"]).parent
    expected = oracle(train_on="last")[:-4]
    assert sorted(unpacked(run["rows"])) == sorted(expected)
    assert sorted(expected) != sorted(oracle()[:-4])


def test_preprocess_audits_what_it_prepares(runs: dict[str, Any]) -> None:
    run = succeeded(runs["preprocess"])
    assert "packing off (rows are packed when they are trained), collapse off" in run["log"]
    assert "sft-plugins audit of train rows: 20 rows" in run["log"]
    assert "check_dataset_labels" in run["log"], "what Axolotl itself prints is printed"
    assert "missing_stop in" in runs["preprocess finds faults"]["error"]


def test_evaluate_audits_isolates_and_writes_its_summary(runs: dict[str, Any], folder: Path) -> None:
    """`axolotl evaluate` asks no plug-in for rows: they are flattened by the collator instead."""
    run = succeeded(runs["evaluate"])
    assert run["evaluation"]["collator"] == "BlockDiagonalPackingCollator"
    assert run["evaluation"]["together"] == pytest.approx(run["evaluation"]["alone"], rel=1e-5)
    assert (folder / "out" / "evaluate" / "eval_summary.csv").is_file()
    assert "sft-plugins audit of evaluation rows: 4 rows" in run["log"]
    assert "each batch flattened to one row, isolated here), collapse off (nothing is trained)" in run["log"]
    assert "AxolotlCollapseCallback" not in run["callbacks"]


def test_evaluate_refuses_rows_with_faults(runs: dict[str, Any]) -> None:
    error = runs["evaluate finds faults"]["error"]
    assert error.startswith("MaskingError: [audit] the train rows are not masked exactly: missing_stop in")


def test_the_result_answers_under_axolotl_inference(runs: dict[str, Any], folder: Path) -> None:
    from peft import PeftModel

    run = succeeded(runs["inference"])
    assert "takes no part in `axolotl inference`" in run["log"]
    assert "isolation proved" not in run["log"], "generation packs nothing"
    assert "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n" in run["log"], "as the model was trained"
    assert "`chat_template` is not set" not in run["log"]
    base = LlamaForCausalLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(base, folder / "out" / "packed")
    moved = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert moved
    assert all(p.abs().max() > 0 for p in moved), "the adapter was trained"


def test_inference_without_a_template_is_warned_of(runs: dict[str, Any]) -> None:
    """Axolotl takes the tokenizer's template for `type: chat_template` alone, and no word is said of it."""
    log = succeeded(runs["inference without a template"])["log"]
    assert "<|im_start|>" not in log
    assert "for rows of messages set `chat_template: tokenizer_default`" in log


@pytest.mark.parametrize("name", ["merge", "merge, legacy"])
def test_merge_lora_gives_the_trained_model(runs: dict[str, Any], folder: Path, name: str) -> None:
    from peft import PeftModel

    assert "takes no part in `axolotl merge-lora`" in succeeded(runs[name])["log"]
    merged = LlamaForCausalLM.from_pretrained(folder / "out" / name.replace(", ", "_") / "merged", dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    expected = PeftModel.from_pretrained(base, folder / "out" / "packed").merge_and_unload().state_dict()
    found = merged.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
    moved = [key for key in before if not torch.equal(before[key], found[key])]
    assert len(moved) == 14, "seven projections in each of two layers"


def test_a_remedy_is_told_in_the_words_of_the_yaml(runs: dict[str, Any]) -> None:
    error = runs["row too long"]["error"]
    assert error.startswith("MaskingError: [overflow] (row ")
    assert "Remedy: Raise `sequence_len`, or choose `sft_plugins.masking.overflow: drop`, `truncate` or" in error


def test_fields_with_other_names_are_masked_alike(runs: dict[str, Any]) -> None:
    assert sorted(unpacked(succeeded(runs["other names"])["rows"])) == sorted(oracle()[:-4])


def test_our_rows_merge_with_theirs(runs: dict[str, Any]) -> None:
    """Two strategies, one data set: the columns have the same types."""
    assert len(unpacked(succeeded(runs["ours and theirs"])["rows"])) == 2 * len(CONVERSATIONS) - 4


def test_the_audit_is_silent_on_good_rows(runs: dict[str, Any]) -> None:
    run = succeeded(runs["good rows"])
    assert "sft-plugins audit of train rows: 20 rows" in run["log"]
    assert "; 0 faults" in run["log"]


FAULTS = {
    "typo in roles": "no_supervised_tokens in 20 rows",
    "no end of turn": "missing_stop in 20 rows",
    "empty answers": "no_supervised_tokens in 1 rows (first 3)",
    "truncated": "missing_stop in",
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_audit_finds_planted_faults_before_the_model_is_loaded(runs: dict[str, Any], name: str) -> None:
    """M7, M11, M12, M22 in rows that Axolotl's own strategies labelled."""
    error = runs[name]["error"]
    assert error.startswith("MaskingError: [audit] the train rows are not masked exactly: ")
    assert FAULTS[name] in error
    assert f"`type: {STRATEGY}`" in error


def test_the_audit_only_warns_where_it_is_told_to(runs: dict[str, Any]) -> None:
    run = runs["only warned"]
    assert "sft-plugins audit: " in run["log"]
    assert "missing_stop in" in run["log"]
    assert "[audit]" not in (run["error"] or "")


def test_a_setting_of_the_dataset_that_asks_for_another_mask_is_refused(runs: dict[str, Any]) -> None:
    error = runs["roles refused"]["error"]
    assert "`roles_to_train: ['user']` in `datasets:`" in error
    assert "Remove `roles_to_train`" in error
