"""Tiny training runs to watch: a byte-level chat tokenizer, a two-layer model with dropout, rows, and what a run leaves behind.

`fingerprint(trainer)` is everything that must not differ between a run with the callback and the same run without it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from sft_plugins.collapse.callback import ModeCollapseCallback
from sft_plugins.collapse.detect.verdict import DetectorConfig
from testkit.tokenizers import CHATML

PROMPTS = [
    "Tell a story.",
    "Name a colour.",
    "What now?",
    {"prompt": "Two plus two?", "tag": "closed"},
    "Say hi.",
    "A poem, please.",
]
SAFE = "I'm sorry, but I can't help with that. Please ask a professional."
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 12,
    "samples_per_prompt": 3,
    "budget": None,
    "report": False,
    # An untrained model hardly ever stops; its answers would be too often cut for a baseline.
    "detector": DetectorConfig(max_truncated=1.0, max_empty=1.0),
}
TIMED = ("runtime", "per_second", "flos", "_time")
"""Parts of the names of figures that hold the clock, not the run."""


def byte_tokenizer(*, chat_template: str | None = CHATML, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, and five special ones."""
    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>" if pad else None,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(*, seed: int = 0, dropout: float = 0.2, **changes: Any) -> LlamaForCausalLM:
    """Llama with two layers of width 32; `attention_dropout` on, so that every training step draws random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "vocab_size": 261,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "attention_dropout": dropout,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        }
        return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


def saved_base(folder: Path, **changes: Any) -> Path:
    """A tiny base model with its tokenizer on disk."""
    tiny_model(dropout=0.0, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def lora(model: nn.Module, **changes: Any) -> Any:
    """A LoRA adapter with dropout on the model's attention."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return get_peft_model(model, LoraConfig(**{**options, **changes}))


def watcher(folder: Path | None, **changes: Any) -> ModeCollapseCallback:
    """A watch that looks at every second step; `tokenizer` and `prompts` are changed like any other option."""
    options = {"embedder": fake_embedder, "output_dir": folder, "max_new_tokens": 6, "every_steps": 2, **changes}
    tokenizer, prompts = options.pop("tokenizer", None) or byte_tokenizer(), options.pop("prompts", PROMPTS)
    return ModeCollapseCallback(tokenizer, prompts, **{**OPTIONS, **options})


def rows(count: int = 24, *, length: int = 20, seed: int = 3) -> list[dict[str, list[int]]]:
    """Tokenised rows of random bytes, the first quarter unsupervised."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = rng.integers(5, 261, size=length).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 4) + ids[length // 4 :]})
    return made


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of one length as tensors."""
    return {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Six steps of two rows on the CPU, logging each."""
    return TrainingArguments(**{**plain_arguments(folder), **changes})


def plain_arguments(folder: Path) -> dict[str, Any]:
    """The same, for hosts with arguments of their own."""
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 11,
        "disable_tqdm": True,
    }


def train(model: nn.Module, folder: Path, *, callbacks: Any = (), resume: str | None = None, **changes: Any) -> Trainer:
    """Run the plain Trainer and return it."""
    set_seed(5)
    evaluated = {"eval_dataset": rows(4, seed=9)} if "eval_strategy" in changes else {}
    trainer = Trainer(
        model,
        arguments(folder, **changes),
        train_dataset=rows(),
        data_collator=collate,
        callbacks=list(callbacks),
        **evaluated,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def fingerprint(trainer: Trainer) -> dict[str, Any]:
    """Weights, gradients' owners, optimizer state, log history without added records, and the random numbers that follow."""
    digest = hashlib.sha256()
    for name, value in trainer.model.state_dict().items():
        digest.update(name.encode() + value.detach().contiguous().cpu().numpy().tobytes())
    optimizer = hashlib.sha256()
    for group in trainer.optimizer.state_dict()["state"].values():
        for key in sorted(group):
            optimizer.update(key.encode() + torch.as_tensor(group[key]).cpu().numpy().tobytes())
    history = [
        {k: v for k, v in record.items() if not any(part in k for part in TIMED)}
        for record in trainer.state.log_history
        if not any(key.startswith("collapse/") for key in record)
    ]
    return {
        "weights": digest.hexdigest(),
        "optimizer": optimizer.hexdigest(),
        "history": history,
        "trainable": [name for name, p in trainer.model.named_parameters() if p.requires_grad],
        "training": [name for name, m in trainer.model.named_modules() if m.training],
        "use_cache": trainer.model.config.use_cache,
        "generation": trainer.model.generation_config.to_dict(),
        "next_random": float(torch.rand(())),
    }


def added_records(trainer: Trainer) -> list[dict[str, Any]]:
    """The records of the log history that the callback added."""
    return [r for r in trainer.state.log_history if any(key.startswith("collapse/") for key in r)]


def fake_embedder(texts: list[str]) -> np.ndarray:
    """Letter counts: deterministic, fast, and different texts differ."""
    return np.array([[1 + text.count(chr(c)) for c in range(97, 123)] for text in texts], dtype=np.float32)
