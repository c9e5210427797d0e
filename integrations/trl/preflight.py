"""TRL's arguments (`trl sft --config`, or an `SFTConfig` as JSON) → `Plan`, with TRL 1.16's defaults.

Without `components`, everything is judged as TRL does it: its masks, its packing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from sft_plugins.errors import AssetError
from sft_plugins.integrations.config_file import (
    KnownKeys,
    Overrides,
    entries_of,
    keys_findings,
    needed,
    number,
    of_config,
    switch,
)
from sft_plugins.integrations.trl.rows import TRLRows
from sft_plugins.preflight import DataEntry, Finding, Plan, home, read_text

STRATEGIES = ("bfd", "bfd_split", "wrapped")


def read(data: Mapping[str, Any], path: str, overrides: Overrides) -> tuple[Plan, KnownKeys]:
    """The plan, and every key that the installed TRL knows."""
    model = needed(
        overrides.model or data.get("model_name_or_path"),
        code="no_model",
        what="model",
        path=path,
        remedy="Add `model_name_or_path:`, or give --model.",
    )
    ours, known = overrides.components, _known_keys()
    if overrides.masking and not ours:
        raise AssetError(
            f"{path}: {', '.join(overrides.masking)} say how sft-plugins masks, and in this run TRL masks.",
            code="bad_option",
            remedy="Add --components, or leave the options out.",
        )
    packs = switch(data, "packing")
    no_limit = "max_length" in data and data["max_length"] is None
    plan = Plan(
        host="TRL",
        path=path,
        model=model,
        tokenizer=model,
        attn_implementation=data.get("attn_implementation"),
        entries=tuple(_entries(data, path, overrides)),
        max_length=None if no_limit else int(number(data, "max_length", 1024, path)),
        packer=("sft_plugins" if ours else "host") if packs else None,
        isolated=ours,
        packs_evaluation=_evaluates(data) and switch(data, "eval_packing", default=packs),
        batch_size=int(number(data, "per_device_train_batch_size", 8, path)),
        accumulation=int(number(data, "gradient_accumulation_steps", 1, path)),
        epochs=number(data, "num_train_epochs", 3, path),
        devices=overrides.devices,
        max_steps=_max_steps(data, path),
        findings=(*keys_findings(data, known), *(() if ours else _findings(data, path))),
        look=TRLRows(
            assistant_only=switch(data, "assistant_only_loss"), completion_only=data.get("completion_only_loss")
        ).look,
    )
    return plan, known


def _entries(data: Mapping[str, Any], path: str, overrides: Overrides) -> Iterator[DataEntry]:
    everything = not switch(data, "assistant_only_loss")
    shared: dict[str, Any] = {
        "exact": overrides.components,
        "trains": "everything" if everything else "answers",
        "chat_template": _template(data),
        "text_field": data.get("dataset_text_field") or "text",
        "masking": overrides.masking if overrides.components else {},
    }
    if overrides.data:
        yield DataEntry(where="--data", path=overrides.data, **shared)
        return
    mixture = entries_of(data, "datasets", path)
    for index, entry in enumerate(mixture):
        file = needed(
            entry.get("path"),
            code="no_data",
            what=f"`path` in datasets[{index}]",
            path=path,
            remedy="Give a file or folder.",
        )
        yield DataEntry(where=f"datasets[{index}]", path=file, split=entry.get("split"), **shared)
    if mixture:
        return
    name = needed(
        data.get("dataset_name"),
        code="no_data",
        what="data",
        path=path,
        remedy="Add `dataset_name:` (a file or folder), or give --data.",
    )
    yield DataEntry(where="dataset_name", path=name, split=data.get("dataset_train_split"), **shared)
    if _evaluates(data) and data.get("dataset_test_split"):
        yield DataEntry(
            where="dataset_test_split", path=name, split=data["dataset_test_split"], evaluation=True, **shared
        )


def _evaluates(data: Mapping[str, Any]) -> bool:
    return data.get("eval_strategy") not in (None, False, "no")  # YAML reads a bare `no` as false


def _template(data: Mapping[str, Any]) -> str | None:
    """The text of `chat_template_path`, when that is a file of its own."""
    given = data.get("chat_template_path")
    if not given or home(given).is_dir():
        return None
    return read_text(given)


def _findings(data: Mapping[str, Any], path: str) -> Iterator[Finding]:
    strategy = data.get("packing_strategy") or "bfd"
    if strategy not in STRATEGIES:
        raise AssetError(
            f"{path}: `packing_strategy: {strategy}`; TRL knows {', '.join(STRATEGIES)}.",
            code="bad_config",
            remedy="Correct `packing_strategy`.",
        )
    if switch(data, "packing") and strategy != "bfd":
        yield of_config(
            "error",
            "fragments",
            f"packing_strategy: {strategy}",
            "documents that are cut go on in another row: their answers are trained without their prompt.",
            "Use `packing_strategy: bfd`, or pack_dataset, which cuts nothing without being told to.",
            "P9",
        )
    if switch(data, "use_liger_kernel"):
        yield of_config(
            "note",
            "fused_loss",
            "use_liger_kernel",
            "the fused loss returns no logits: TRL's own entropy is not logged; ModeCollapseCallback does not need it.",
            "",
            "C10",
        )
    if _context_parallel(data) > 1:
        yield of_config(
            "error" if switch(data, "packing") else "note",
            "context_parallel",
            "parallelism_config",
            "context parallelism splits rows over devices and drops the mask between documents.",
            "Turn packing off, or use data parallelism.",
            "P15",
        )


def _context_parallel(data: Mapping[str, Any]) -> int:
    config = data.get("parallelism_config")
    return int(config.get("cp_size") or 1) if isinstance(config, Mapping) else 1


def _max_steps(data: Mapping[str, Any], path: str) -> int | None:
    """None for −1, TRL's word for as many as the epochs make."""
    value = data.get("max_steps")
    return None if value in (None, -1, "-1") else int(number(data, "max_steps", 1, path))


def _known_keys() -> KnownKeys:
    try:
        import trl
    except ImportError:
        return KnownKeys(frozenset(), "TRL", complete=False)
    classes = [trl.SFTConfig, trl.ScriptArguments, trl.ModelConfig]
    names = {field.name for cls in classes for field in dataclasses.fields(cls)}
    # Of `trl sft` itself, of `TrainingArguments.to_dict()`, and renamed fields that old files still have.
    names |= {"datasets", "streaming", "test_split_size", "config", "accelerate_config", "env", "_n_gpu"}
    return KnownKeys(names, f"TRL {trl.__version__}", complete=True)
