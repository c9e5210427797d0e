"""The runs of Axolotl that its tests look at: models, rows, and a configuration for each command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from testkit.tokenizers import CHATML, build_tokenizer

PLUGIN = "sft_plugins.integrations.axolotl.SFTPlugin"
STRATEGY = "sft_plugins.integrations.axolotl.strategy"
WITHOUT_END = CHATML.replace("<|im_end|>", "")
ANSWERS = ["The answer is four.", "It is 21 degrees. " * 3, "Fine, thanks.", "Well. " * 9]


def conversation(i: int) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"Why {i}?"},
        {"role": "assistant", "content": ANSWERS[i % 4].strip()},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": ANSWERS[(i + 1) % 4].strip()},
    ]
    return {"messages": turns[: 2 + 2 * (i % 2)]}


CONVERSATIONS = [conversation(i) for i in range(24)]
ALIKE = [
    {"messages": [{"role": "system", "content": "You answer every question in few and plain words."}, *row["messages"]]}
    for row in CONVERSATIONS
]
EMPTY_ANSWERS = [
    {"messages": [{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": "" if i == 3 else "So."}]}
    for i in range(8)
]
OTHER_NAMES = [
    {"dialog": [{"who": "client" if m["role"] == "user" else "bot", "says": m["content"]} for m in row["messages"]]}
    for row in CONVERSATIONS
]


def tiny_tokenizer(template: str = CHATML) -> Any:
    return build_tokenizer("qwen", chat_template=template)


def save_model(folder: Path, template: str = CHATML) -> None:
    tokenizer = tiny_tokenizer(template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,  # at the default, attention is so flat that a leak moves the loss by 1e-5 of itself
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


COLLAPSE = {"prompts": "prompts.jsonl", "samples_per_prompt": 2, "max_new_tokens": 4, "embedder": False, "report": False,
            "budget": False, "every_steps": 2}  # fmt: skip
BASE = {
    "base_model": "model",
    "tokenizer_type": "AutoTokenizer",
    "plugins": [PLUGIN],
    "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": STRATEGY}],
    "val_set_size": 4,
    "shuffle_merged_datasets": False,
    "sequence_len": 96,
    "adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_target_linear": True,
    "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False, "lora_embedding_kernel": False,
    "micro_batch_size": 2, "gradient_accumulation_steps": 1, "num_epochs": 1,
    "learning_rate": 0.001, "optimizer": "adamw_torch", "lr_scheduler": "constant",
    "bf16": False, "fp16": False, "tf32": False, "gradient_checkpointing": False,
    "attn_implementation": "sdpa",
    "dataloader_num_workers": 0, "dataloader_pin_memory": False, "dataset_num_proc": 1,
    "logging_steps": 1,
}  # fmt: skip
QUIET = {"collapse": False}
CUT = {"excess_length_strategy": "truncate", "sequence_len": 24}
THEIRS = [{"path": "rows.jsonl", "ds_type": "json", "type": "chat_template"}]


def theirs(**entry: Any) -> list[dict[str, Any]]:
    return [{**THEIRS[0], **entry}]


# name → (command, changes to BASE). In this order, in one process.
PLAN: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("train", {"sft_plugins": {"collapse": COLLAPSE}}),
    "padded": (
        "train",
        {"sft_plugins": {**QUIET, "packing": False}, "plugins": [PLUGIN, "axolotl.integrations.grokfast.GrokfastPlugin"]},
    ),
    "multipack": (
        "train",
        {
            "sft_plugins": QUIET,
            "sample_packing": True,
            "attn_implementation": None,
            "eval_sample_packing": False,
            "pad_to_sequence_len": False,
        },
    ),
    "trees": (
        "train",
        {
            "sft_plugins": {**QUIET, "packing": {"share_prefixes": True}},
            "datasets": [{"path": "alike.jsonl", "ds_type": "json", "type": STRATEGY}],
            "sequence_len": 192,
        },
    ),
    "without the plug-in": (
        "train",
        {
            "plugins": ["axolotl.integrations.grokfast.GrokfastPlugin"],
            "datasets": THEIRS,
            "sample_packing": True,
            "attn_implementation": None,
            "pad_to_sequence_len": False,
            "max_steps": 1,
        },
    ),
    "preprocess": ("preprocess", {"sft_plugins": QUIET, "dataset_prepared_path": "kept"}),
    "after preprocess": ("rows", {"sft_plugins": QUIET, "dataset_prepared_path": "kept"}),
    "other masks, same folder": (
        "rows",
        {"sft_plugins": {**QUIET, "masking": {"train_on": "last"}}, "dataset_prepared_path": "kept"},
    ),
    "preprocess finds faults": ("preprocess", {"sft_plugins": QUIET, "datasets": THEIRS, **CUT}),
    "evaluate": ("evaluate", {"sft_plugins": {"collapse": COLLAPSE}}),
    "evaluate finds faults": ("evaluate", {"sft_plugins": QUIET, "datasets": THEIRS, **CUT}),
    "inference": (
        "inference",
        {"sft_plugins": {}, "lora_model_dir": "out/packed", "chat_template": "tokenizer_default"},
    ),
    "inference without a template": ("inference", {"sft_plugins": {}, "lora_model_dir": "out/packed"}),
    "merge": ("merge_lora", {"sft_plugins": {}, "lora_model_dir": "out/packed"}),
    "merge, legacy": ("merge_lora", {"sft_plugins": {}, "lora_model_dir": "out/packed", "merge_method": "legacy"}),
    "row too long": ("rows", {"sft_plugins": QUIET, "sequence_len": 24}),
    "other names": (
        "rows",
        {
            "sft_plugins": QUIET,
            "datasets": [
                {
                    "path": "other.jsonl", "ds_type": "json", "type": STRATEGY, "field_messages": "dialog",
                    "message_property_mappings": {"role": "who", "content": "says"},
                    "roles": {"user": ["client"], "assistant": ["bot"]},
                }
            ],
        },
    ),
    "ours and theirs": ("rows", {"sft_plugins": QUIET, "datasets": [BASE["datasets"][0], THEIRS[0]]}),
    "good rows": ("rows", {"sft_plugins": QUIET, "datasets": THEIRS}),
    "typo in roles": ("rows", {"sft_plugins": QUIET, "datasets": theirs(roles_to_train=["asistant"])}),
    "no end of turn": (
        "rows",
        {"sft_plugins": QUIET, "datasets": theirs(chat_template="jinja", chat_template_jinja=WITHOUT_END)},
    ),
    "empty answers": ("rows", {"sft_plugins": QUIET, "datasets": theirs(path="empty.jsonl")}),
    "truncated": ("rows", {"sft_plugins": QUIET, "datasets": THEIRS, **CUT}),
    "only warned": ("rows", {"sft_plugins": {**QUIET, "masking": {"audit": "warn"}}, "datasets": THEIRS, **CUT}),
    "roles refused": (
        "rows",
        {"sft_plugins": QUIET, "datasets": [{**BASE["datasets"][0], "roles_to_train": ["user"]}]},
    ),
}  # fmt: skip


def environment() -> dict[str, str]:
    ours = {
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **ours, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
