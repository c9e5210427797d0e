"""Two processes under `axolotl train`: every document once, and the loss and weights of one process by hand.

The oracle runs every document alone in one process, with plain SGD (`worker_axolotl.by_hand`).
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="the Axolotl plug-in runs in Axolotl's environment")

import yaml

from sft_plugins.masking import PromptMasker
from testkit.optional import needs_deepspeed
from testkit.tiny_training import save_tiny_llama
from testkit.tokenizers import CHATML, build_tokenizer

pytestmark = pytest.mark.slow

PLUGIN = "sft_plugins.integrations.axolotl.SFTPlugin"
STRATEGY = "sft_plugins.integrations.axolotl.strategy"
COUNT = 28
"""Conversations; they fill 12 packed rows."""
EPOCHS = 2
ANSWERS = ["The answer is four.", "It is 21 degrees. It is 21 degrees.", "Fine, thanks.", "Well, well, well."]
BASE: dict[str, Any] = {
    "base_model": "model", "tokenizer_type": "AutoTokenizer", "plugins": [PLUGIN],
    "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": STRATEGY}],
    "val_set_size": 0, "shuffle_merged_datasets": False, "sequence_len": 64, "seed": 7,
    "adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_target_linear": True,
    "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False, "lora_embedding_kernel": False,
    "micro_batch_size": 2, "gradient_accumulation_steps": 1, "num_epochs": EPOCHS, "max_grad_norm": 0.0, "weight_decay": 0.0,
    "learning_rate": 0.05, "optimizer": "sgd", "lr_scheduler": "constant", "warmup_steps": 0,
    "bf16": False, "fp16": False, "tf32": False, "gradient_checkpointing": False, "attn_implementation": "sdpa",
    "dataloader_num_workers": 0, "dataloader_pin_memory": False, "dataset_num_proc": 1, "logging_steps": 1,
}  # fmt: skip
QUIET = {"collapse": False}
PLAN: dict[str, dict[str, Any]] = {
    "ours": {"sft_plugins": QUIET},
    "dealt": {"sft_plugins": {**QUIET, "packing": {"deal": True}}},
    "multipack": {"sft_plugins": QUIET, "sample_packing": True, "pad_to_sequence_len": False},
}
FSDP2: dict[str, Any] = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
    },
}
SHARDED = {"fsdp2": PLAN["ours"] | FSDP2, "fsdp2, multipack": PLAN["multipack"] | FSDP2}
Run = dict[str, Any]


def conversation(i: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"Why {i}?"},
            {"role": "assistant", "content": ANSWERS[i % 4]},
        ]
    }


def tokenizer() -> Any:
    return build_tokenizer("qwen", chat_template=CHATML)


def prepare(folder: Path, plan: dict[str, dict[str, Any]]) -> Path:
    """A tiny model, rows, and one YAML per run; the path of the plan."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_llama(folder / "model", tokenizer(), initializer_range=0.4)
    rows = [conversation(i) for i in range(COUNT)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    paths = []
    for name, changes in plan.items():
        own = {"output_dir": f"out/{name}", "dataset_prepared_path": f"prepared/{name}"}
        settings = {**BASE, **own, **changes}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        paths.append([name, str(path)])
    (folder / "plan.json").write_text(json.dumps(paths))
    return folder / "plan.json"


@pytest.fixture(scope="module")
def ranks(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Run]]:
    """Each rank's runs; those with FSDP2 in processes of their own, for what it sets in the environment."""
    folder, sharded = tmp_path_factory.mktemp("axolotl"), tmp_path_factory.mktemp("sharded")
    whole = launch("worker_axolotl.py", 2, folder, str(prepare(folder, PLAN)))
    parts = launch("worker_axolotl.py", 2, sharded, str(prepare(sharded, SHARDED)), "--shard")
    assert (sharded / "out" / "fsdp2" / "adapter_model.safetensors").is_file()
    return [a | b for a, b in zip(whole, parts, strict=True)]


def succeeded(ranks: list[dict[str, Run]], name: str) -> list[Run]:
    found = [rank[name] for rank in ranks]
    for run in found:
        assert run["error"] is None, run["error"]
    return found


def documents() -> set[tuple[int, ...]]:
    masker = PromptMasker(tokenizer())
    return {tuple(row.input_ids) for i in range(COUNT) for row in masker.encode(conversation(i))}


def counts(runs: list[Run]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(ids) for run in runs for ids in chain.from_iterable(run["seen"]))


@pytest.mark.parametrize("name", ["ours", "dealt", "fsdp2"])
def test_every_document_is_trained_once_per_epoch(ranks: list[dict[str, Run]], name: str) -> None:
    """P14: packed by us, in as many rows as the ranks take together."""
    runs = succeeded(ranks, name)
    assert [run["world"] for run in runs] == [2, 2]
    sharded = name in SHARDED
    assert {run["parallel"] for run in runs} == {"FSDPPeftModelForCausalLM" if sharded else "DistributedDataParallel"}
    assert all(run["sharded"] == (run["parameters"] if sharded else 0) for run in runs)
    assert runs[0]["parameters"] > 20
    assert len(documents()) == COUNT
    assert counts(runs) == dict.fromkeys(documents(), EPOCHS)
    assert len(runs[0]["rows"]) == 12


def drawn(runs: list[Run]) -> list[list[list[int]]]:
    """Documents of each micro-batch of each rank, where rows are taken in their order: batch k goes to rank k mod ranks."""
    batches = [runs[0]["rows"][k] + runs[0]["rows"][k + 1] for k in range(0, len(runs[0]["rows"]), 2)]
    return [EPOCHS * batches[rank :: len(runs)] for rank in range(len(runs))]


def test_dealt_rows_reach_the_ranks_that_they_were_dealt_to(ranks: list[dict[str, Run]]) -> None:
    runs = succeeded(ranks, "dealt")
    assert runs[0]["rows"] == runs[1]["rows"], "all ranks deal alike"
    assert [run["seen"] for run in runs] == drawn(runs)
    shuffled = succeeded(ranks, "ours")
    assert [run["seen"] for run in shuffled] != drawn(shuffled), "rows that keep their order anyway would prove nothing"


def test_ranks_wait_less_for_each_other_when_rows_are_dealt(ranks: list[dict[str, Run]]) -> None:
    """A rank's cost in a step is counted on what it trained on, Σ l² over documents."""

    def waiting(name: str) -> float:
        costs = [[sum(len(ids) ** 2 for ids in batch) for batch in run["seen"]] for run in succeeded(ranks, name)]
        return 1 - sum(map(sum, costs)) / (2 * sum(map(max, zip(*costs, strict=True))))

    assert waiting("dealt") < waiting("ours") / 2


def test_multipack_repeats_nothing_and_leaves_out_less_than_a_batch_of_all_ranks(ranks: list[dict[str, Run]]) -> None:
    """P14: what Axolotl's sampler drops the plug-in does not change; `docs/many-processes.md` says how much that is."""
    runs = succeeded(ranks, "multipack")
    count = counts(runs)
    assert set(count.values()) == {EPOCHS}
    assert set(count) <= documents()
    assert len(count) >= COUNT - 5


def assert_trained_as_by_hand(runs: list[Run]) -> None:
    losses = [sum(each) / 2 for each in zip(*(run["losses"] for run in runs), strict=True)]
    assert losses == pytest.approx(runs[0]["expected losses"], rel=1e-5)
    assert runs[0]["logged"] == pytest.approx(losses, rel=1e-5)
    assert runs[1]["weights"] == runs[0]["weights"]
    for run in runs:
        for weight, values in run["expected weights"].items():
            assert run["weights"][weight] == pytest.approx(values, abs=1e-5), weight
    assert max(losses) - min(losses) > 1e-2, "losses that do not change would prove nothing"


@pytest.mark.parametrize("name", [*PLAN, *SHARDED])
def test_loss_and_weights_are_those_of_the_documents_alone_in_one_process(
    ranks: list[dict[str, Run]], name: str
) -> None:
    assert_trained_as_by_hand(succeeded(ranks, name))


@needs_deepspeed
def test_zero_2_trains_every_document_as_by_hand(launch: Any, tmp_path: Path) -> None:
    stage = {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    }
    (tmp_path / "zero2.json").write_text(json.dumps(stage))
    plan = prepare(tmp_path, {"zero2": {**PLAN["ours"], "deepspeed": str(tmp_path / "zero2.json")}})
    runs = succeeded(launch("worker_axolotl.py", 2, tmp_path, str(plan), "--shard", "--deepspeed"), "zero2")
    assert [run["parallel"] for run in runs] == ["DeepSpeedEngine"] * 2
    assert counts(runs) == dict.fromkeys(documents(), EPOCHS)
    assert_trained_as_by_hand(runs)


@pytest.mark.parametrize("name", [*PLAN, *SHARDED])
def test_no_rank_waits_for_another_at_the_end(ranks: list[dict[str, Run]], name: str) -> None:
    """P14: equally many steps and batches."""
    a, b = succeeded(ranks, name)
    assert a["steps"] == b["steps"] == len(a["seen"]) == len(b["seen"]) > 1
