"""What a small training takes: a Llama of a few thousand weights, rows of one exchange each, arguments of one plain step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from testkit.tokenizers import build_tokenizer

ANSWERS = ("The answer is four.", "It is 21 degrees in Paris.", "I'm fine, thanks.", "Say it again, slowly.")


def tiny_llama(tokenizer: Any, **changes: Any) -> LlamaForCausalLM:
    """A Llama for `tokenizer`, its weights drawn from seed 0; `changes` are fields of its configuration."""
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


def save_tiny_llama(folder: Path, tokenizer: Any = None, **changes: Any) -> Path:
    """`tiny_llama` and its tokenizer in `folder`, as `save_pretrained` leaves them; without a tokenizer, ChatML by bytes."""
    tokenizer = build_tokenizer("bytelevel", eos="<|im_end|>") if tokenizer is None else tokenizer
    tiny_llama(tokenizer, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def exchanges(count: int) -> list[dict[str, Any]]:
    """Rows of one question and one of `ANSWERS`."""
    return [
        {"messages": [{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": ANSWERS[i % 4]}]}
        for i in range(count)
    ]


def one_sgd_step(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a trainer under which each weight moves by its gradient times the learning rate, on the CPU."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return {**arguments, **changes}
