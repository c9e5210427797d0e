"""Settings that are each allowed and cannot hold together: what contradicts what, and what to do about it.

Invariant: whatever Axolotl would do to our rows behind our back (cut them, order them, shard them, label them) is refused
here, or known to leave them alone. Reads the raw YAML, before Axolotl's defaults are filled in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from sft_plugins.integrations.axolotl.settings import KEY, MaskingSettings, PackingSettings, Settings

STRATEGY = "sft_plugins.integrations.axolotl.strategy"
Packer = Literal["sft_plugins", "axolotl"]


def field(record: Any, name: str) -> Any:
    """A setting of a dataset, which is a mapping in the YAML and a pydantic model on the way through validation."""
    return record.get(name) if isinstance(record, Mapping) else getattr(record, name, None)


def dataset_entries(data: Mapping[str, Any]) -> list[Any]:
    """Entries of `datasets` and `test_datasets`."""
    return [entry for name in ("datasets", "test_datasets") for entry in data.get(name) or ()]


def is_ours(entry: Any) -> bool:
    """Whether a dataset's rows are masked by our strategy."""
    return str(field(entry, "type") or "").removesuffix(".load") == STRATEGY


def packer(settings: Settings, data: Mapping[str, Any]) -> Packer | None:
    """Who packs: us, Axolotl, or nobody."""
    if settings.packing is None:
        return None
    if settings.packing.by == "auto":
        return "axolotl" if data.get("sample_packing") else "sft_plugins"
    return settings.packing.by


def contradictions(settings: Settings, data: Mapping[str, Any]) -> list[str]:
    """One line per contradiction, each with its remedy; empty where there is none.

    Raises:
        ValueError: for a file named by `deepspeed` that cannot be read.
    """
    return [
        *_general(settings, data),
        *_masking(settings, data),
        *_packing(settings, data),
        *_collapse(settings, data),
    ]


def _general(settings: Settings, data: Mapping[str, Any]) -> Iterator[str]:
    if settings.masking is None and settings.packing is None and settings.collapse is None:
        yield f"{KEY}: every part is off. Remedy: remove the plug-in from `plugins:`, or leave a part on."
    on = [name for name in ("masking", "packing") if getattr(settings, name) is not None]
    off = " and ".join(f"`{KEY}.{name}: false`" for name in on)
    if not on:
        return
    refused = {
        "rl": "works on preference data",
        "reward_model": "trains a classifier",
        "process_reward_model": "trains a classifier",
        "pretraining_dataset": "has no prompts, and streams",
        "streaming": "streams rows, which cannot be checked or planned as a whole",
        "processor_type": "makes multimodal batches; only text is supported",
        "is_multimodal": "makes multimodal batches; only text is supported",
        "skip_prepare_dataset": "leaves rows without labels",
    }
    for name, why in refused.items():
        if data.get(name):
            yield f"`{name}` {why}: not together with {KEY}. Remedy: remove `{name}`, or set {off}."
    if data.get("balance_labels") and not data.get("sample_packing"):
        yield f"`balance_labels` knows only Axolotl's own collators. Remedy: remove it, or set {off}."


def _masking(settings: Settings, data: Mapping[str, Any]) -> Iterator[str]:
    if settings.masking is None:
        if any(map(is_ours, dataset_entries(data))):
            yield f"{KEY}.masking: false, but a dataset has `type: {STRATEGY}`. Remedy: leave masking on."
        return
    if data.get("train_on_inputs"):
        yield (
            f"`train_on_inputs: true` puts loss on prompts, which {KEY}.masking exists to prevent. "
            f"Remedy: remove it, or set `{KEY}.masking: false`."
        )
    used = [name for name in MaskingSettings.model_fields if name in settings.masking.model_fields_set - {"audit"}]
    if used and not any(map(is_ours, dataset_entries(data))):
        yield (
            f"{KEY}.masking.{used[0]} has no effect: no dataset is masked by the plug-in. "
            f"Remedy: give one `type: {STRATEGY}`, or remove `{used[0]}`."
        )


def _packing(settings: Settings, data: Mapping[str, Any]) -> Iterator[str]:
    who = packer(settings, data)
    if settings.packing is None or who is None:
        return
    off = f"`{KEY}.packing: false`"
    if who == "sft_plugins" and data.get("sample_packing"):
        yield (
            f"`sample_packing: true` and {KEY}.packing.by: sft_plugins would pack twice. Remedy: remove `sample_packing`, "
            f"or set `{KEY}.packing.by: axolotl`, which makes Axolotl's own packing exact."
        )
    if who == "axolotl" and not data.get("sample_packing"):
        yield (
            f"{KEY}.packing.by: axolotl leaves packing to Axolotl, and `sample_packing` is not true. "
            f"Remedy: set `sample_packing: true`, or `{KEY}.packing.by: sft_plugins`."
        )
    own = [name for name in PackingSettings.model_fields if name in settings.packing.model_fields_set - {"by"}]
    if who == "axolotl" and own:
        yield (
            f"{KEY}.packing.{own[0]} is for our own packing, and here `sample_packing: true` packs. "
            f"Remedy: remove `{own[0]}`, or `sample_packing`."
        )
    if who == "sft_plugins":
        yield from _own_packing(data, off)
    for name in ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"):
        if (data.get(name) or 1) > 1:
            yield f"`{name}: {data[name]}` splits rows: documents cannot be isolated. Remedy: remove it, or set {off}."
    nested = field(data.get("context_parallel") or {}, "size")  # Axolotl 0.21's own plug-in
    if (nested or 1) > 1:
        yield f"`context_parallel.size: {nested}` splits rows: documents cannot be isolated. Remedy: remove it, or set {off}."
    yield from _fsdp(data, off)
    if _zero_stage(data.get("deepspeed")) == 3:
        yield f"`deepspeed` stage 3 shards the model before isolation can be proved on it. Remedy: use stage 2, or set {off}."
    if data.get("batch_flattening"):
        yield f"`batch_flattening` flattens rows a second time. Remedy: remove it, or set {off}."


def _fsdp(data: Mapping[str, Any], off: str) -> Iterator[str]:
    """FSDP2 shards a model that was loaded whole and isolated; everything else has no whole model to prove isolation on."""
    name = _fsdp_key(data)
    if name is None:
        return
    options = data.get("fsdp_config") or {}
    version = data.get("fsdp_version") or field(options, "fsdp_version") or field(options, "version")
    if str(version) != "2":
        yield (
            f"`{name}` without `fsdp_version: 2` wraps the model so that documents cannot be isolated. "
            f"Remedy: set `fsdp_version: 2`, use DDP, or set {off}."
        )
    for loading in ("cpu_ram_efficient_loading", "fsdp_cpu_ram_efficient_loading"):
        if field(options, loading):
            yield (
                f"`fsdp_config.{loading}: true` loads weights on one rank only, and the others have none to prove isolation "
                f"on. Remedy: remove it, or set {off}."
            )


def _fsdp_key(data: Mapping[str, Any]) -> str | None:
    return next((name for name in ("fsdp", "fsdp_config") if data.get(name)), None)


def _collapse(settings: Settings, data: Mapping[str, Any]) -> Iterator[str]:
    if settings.collapse is None:
        return
    sharding = [f"`{name}`"] if (name := _fsdp_key(data)) is not None else []
    if _zero_stage(data.get("deepspeed")) == 3:
        sharding.append("`deepspeed` stage 3")
    for what in sharding:
        yield (
            f"{what} shards the weights, and {KEY}.collapse looks at whole ones. "
            f"Remedy: set `{KEY}.collapse: false`, or use DDP."
        )


def _own_packing(data: Mapping[str, Any], off: str) -> Iterator[str]:
    if data.get("sequence_len") is None:
        yield f"{KEY}.packing needs `sequence_len`, the tokens of a packed row. Remedy: set `sequence_len`, or {off}."
    reorders = "Remedy: remove it, or set " + off + "."
    if data.get("eval_sample_packing"):
        yield f"`eval_sample_packing` without `sample_packing` contradicts {KEY}.packing. {reorders}"
    if data.get("curriculum_sampling"):
        yield f"`curriculum_sampling` keeps the order of rows, and packing changes it. {reorders}"
    if data.get("group_by_length"):
        yield f"`group_by_length` sorts rows by length, and packed rows are all full. {reorders}"
    if data.get("remove_unused_columns"):
        yield f"`remove_unused_columns: true` would remove where documents end. {reorders}"


def _zero_stage(deepspeed: Any) -> int | None:
    """The ZeRO stage of a DeepSpeed configuration, a mapping or the path of a JSON file."""
    if isinstance(deepspeed, str) and Path(deepspeed).is_file():
        try:
            deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`deepspeed: {deepspeed}` cannot be read as JSON: {error}. Remedy: correct the file."
            ) from error
    zero = deepspeed.get("zero_optimization") if isinstance(deepspeed, Mapping) else None
    return zero.get("stage") if isinstance(zero, Mapping) else None
