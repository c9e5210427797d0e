"""LoRA training through TRL on a GPU: packed as padded, step for step; QLoRA; and a watch that changes nothing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import set_seed

from sft_plugins import BlockDiagonalPackingCollator, StrictPromptMaskingCollator, isolate, pack_dataset
from sft_plugins.integrations.trl import sft_arguments
from testkit.devices import DEVICE, host_arguments, packed_on_device
from testkit.isolation_oracle import gap, make_documents, run_alone, run_packed
from testkit.watched_runs import OPTIONS, PROMPTS, byte_tokenizer, fake_embedder, fingerprint, lora, rows, tiny_model

pytestmark = pytest.mark.gpu
trl = pytest.importorskip("trl")

STEPS, DOCUMENTS_PER_ROW, TOKENS = 12, 4, 20


def sft(
    model: Any, folder: Path, dataset: Dataset, collator: Any, *, batch_size: int, kind: Any, **changes: Any
) -> Any:
    set_seed(5)
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": batch_size, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "seed": 11, "bf16": False,
        "gradient_checkpointing": False, "shuffle_dataset": False, **host_arguments(), **sft_arguments(kind), **changes,
    }  # fmt: skip
    known = trl.SFTConfig.__dataclass_fields__
    config = trl.SFTConfig(str(folder), **{name: value for name, value in arguments.items() if name in known})
    trainer = trl.SFTTrainer(
        model, config, train_dataset=dataset, data_collator=collator, processing_class=byte_tokenizer()
    )
    # Both runs see the same documents in the same step: in the order of the data.
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(dataset)
    trainer.train()
    return trainer


needs_bitsandbytes = pytest.mark.skipif(
    not find_spec("bitsandbytes"), reason="needs bitsandbytes (Axolotl's environment has it)"
)


def four_bit(folder: Path) -> Any:
    """NF4 weights, computing in bf16, ready for LoRA."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model(dropout=0.0, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantised, dtype=torch.bfloat16, device_map={"": DEVICE}
    )
    assert any(parameter.dtype == torch.uint8 for parameter in model.parameters()), "nothing in 4 bits"
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


@pytest.mark.parametrize("kind", ["fp32", "bf16", pytest.param("4-bit", marks=needs_bitsandbytes)])
def test_packed_and_padded_lora_runs_have_one_loss_curve(kind: str, tmp_path: Path) -> None:
    documents = Dataset.from_list(rows(STEPS * DOCUMENTS_PER_ROW, length=TOKENS))
    packed = pack_dataset(documents, DOCUMENTS_PER_ROW * TOKENS, seed=None).dataset

    def model() -> Any:
        if kind == "4-bit":
            return lora(four_bit(tmp_path / "base"), lora_dropout=0.0)
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        return lora(tiny_model(dropout=0.0).to(DEVICE, dtype), lora_dropout=0.0)

    padded_model, packed_model = model(), model()
    padded = sft(
        padded_model, tmp_path / "padded", documents, StrictPromptMaskingCollator(byte_tokenizer()),
        batch_size=DOCUMENTS_PER_ROW, kind="masked",
    )  # fmt: skip
    collator = BlockDiagonalPackingCollator(byte_tokenizer(), model=packed_model)
    ours = sft(packed_model, tmp_path / "packed", packed, collator, batch_size=1, kind="packed")
    curves = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in (padded, ours)]
    assert len(curves[0]) == STEPS
    assert curves[0][-1] < curves[0][0], "nothing was learned"
    tolerance = 1e-4 if kind == "fp32" else 2e-2
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=tolerance, atol=tolerance)


@needs_bitsandbytes
def test_qlora_packs_exactly(tmp_path: Path, calls: list[Any]) -> None:
    """4-bit weights, LoRA on top: packed as each document alone, to what bf16 costs."""
    model = lora(four_bit(tmp_path), lora_dropout=0.0, init_lora_weights="gaussian")
    documents = [document.to(DEVICE) for document in make_documents([5, 1, 40, 17, 65], 256)]
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        alone = run_alone(model, documents)
        report = isolate(model)
        packed = run_packed(model, documents, batch=packed_on_device)
    assert calls, report.backend
    measured = gap(alone, packed)
    assert measured.logits <= 4 * torch.finfo(torch.bfloat16).eps
    assert measured.gradients <= 16 * torch.finfo(torch.bfloat16).eps


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # `make test-gpu` sets it before CUDA starts
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def watched(folder: Path, callbacks: list[Any], **changes: Any) -> Any:
    model = lora(tiny_model().to(DEVICE))
    set_seed(5)
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "seed": 11, "disable_tqdm": True, "max_length": None, "bf16": False, **host_arguments(), **changes,
    }  # fmt: skip
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(str(folder), **arguments), train_dataset=Dataset.from_list(rows(64)),
        processing_class=byte_tokenizer(), callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    return trainer


def watcher(folder: Path, **changes: Any) -> Any:
    from sft_plugins import ModeCollapseCallback

    options = {
        **OPTIONS,
        "embedder": fake_embedder,
        "output_dir": folder,
        "max_new_tokens": 6,
        "every_steps": 2,
        **changes,
    }
    return ModeCollapseCallback(byte_tokenizer(), PROMPTS, eval_pairs=rows(3), **options)


@pytest.mark.usefixtures("deterministic")
def test_the_collapse_watch_leaves_a_run_bit_for_bit_as_it_was(tmp_path: Path) -> None:
    """C2, C3 on a GPU: its generator's state is one more thing to put back."""
    without = fingerprint(watched(tmp_path / "without", []))
    callback = watcher(tmp_path / "watch")
    with_it = fingerprint(watched(tmp_path / "with", [callback]))
    assert callback.verdict is not None, "it never looked"
    assert with_it == without


def test_the_collapse_watch_stays_inside_its_budget(tmp_path: Path) -> None:
    """At most its share of wall time, and one look more: a look that has begun is finished."""
    share = 0.2
    callback = watcher(tmp_path / "watch", budget=share, every_steps=1)
    watched(tmp_path / "run", [callback], max_steps=120)
    cost = next(record["cost"] for record in history(callback) if record["kind"] == "end")
    looks = cost["probes_tier1"] + cost["probes_tier2"]
    assert looks, "it never looked"
    assert cost["seconds"] <= share * cost["wall_seconds"] + 2 * cost["seconds"] / looks


def history(callback: Any) -> list[dict[str, Any]]:
    from sft_plugins.collapse.history import read_history

    return list(read_history(callback.history_path))
