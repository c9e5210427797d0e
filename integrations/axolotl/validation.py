"""Settings that are each allowed and cannot hold together: what contradicts what, and what to do about it.

Invariant: whatever Axolotl would do to our rows behind our back (cut them, order them, shard them, label them) is refused
here, or known to leave them alone. Reads the raw YAML, before Axolotl's defaults are filled in. In a run whose `plugins:`
does not name the plug-in nothing of it is active; where it does, a missing `sft_plugins:` means `sft_plugins: {}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, model_validator

from sft_plugins.errors import AssetError
from sft_plugins.integrations.axolotl.prepared import separate_prepared_path
from sft_plugins.integrations.axolotl.settings import (
    KEY,
    PLUGIN,
    STRATEGY,
    MaskingSettings,
    PackingSettings,
    Settings,
    dataset_entries,
    field,
    is_ours,
    listed,
    packer,
)
from sft_plugins.preflight import Finding


class SFTPluginsArgs(BaseModel):
    """Joins Axolotl's own configuration class, whose validators run beside this one."""

    # Kept as the YAML has it: Axolotl drops None when it dumps its configuration, and false must stay false.
    sft_plugins: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_sft_plugins(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if not listed(data):
            if data.get(KEY) is not None:
                raise ValueError(
                    f"`{KEY}:` is set, but `plugins:` does not list the plug-in. Remedy: add `- {PLUGIN}` to `plugins:`."
                )
            return data
        raw = data.get(KEY)
        settings = Settings.read(raw)
        try:
            found = contradictions(settings, data)
        except AssetError as error:
            raise ValueError(f"{error.message} Remedy: {error.remedy}") from error
        if found:
            raise ValueError("\n".join(f"{one.message} Remedy: {one.remedy}" for one in found))
        changed = {**data, KEY: {} if raw is None else raw}
        path = separate_prepared_path(settings, changed)
        return changed if path is None else {**changed, "dataset_prepared_path": path}


def contradictions(settings: Settings, data: Mapping[str, Any]) -> list[Finding]:
    """What cannot hold together, each with its remedy; empty where everything can.

    Raises:
        AssetError: `bad_config` for a file named by `deepspeed` that cannot be read.
    """
    return [
        *_general(settings, data),
        *_masking(settings, data),
        *_packing(settings, data),
        *_collapse(settings, data),
    ]


def _against(message: str, remedy: str, failure: str = "") -> Finding:
    return Finding(
        level="error", part="config", code="contradiction", where=KEY, message=message, remedy=remedy, failure=failure
    )


def _general(settings: Settings, data: Mapping[str, Any]) -> Iterator[Finding]:
    if settings.masking is None and settings.packing is None and settings.collapse is None:
        yield _against(f"{KEY}: every part is off.", "remove the plug-in from `plugins:`, or leave a part on.")
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
            yield _against(f"`{name}` {why}: not together with {KEY}.", f"remove `{name}`, or set {off}.")
    if data.get("balance_labels") and not data.get("sample_packing"):
        yield _against("`balance_labels` knows only Axolotl's own collators.", f"remove it, or set {off}.")


def _masking(settings: Settings, data: Mapping[str, Any]) -> Iterator[Finding]:
    if settings.masking is None:
        if any(map(is_ours, dataset_entries(data))):
            yield _against(f"{KEY}.masking: false, but a dataset has `type: {STRATEGY}`.", "leave masking on.")
        return
    if data.get("train_on_inputs"):
        yield _against(
            f"`train_on_inputs: true` puts loss on prompts, which {KEY}.masking exists to prevent.",
            f"remove it, or set `{KEY}.masking: false`.",
        )
    used = [name for name in MaskingSettings.model_fields if name in settings.masking.model_fields_set - {"audit"}]
    if used and not any(map(is_ours, dataset_entries(data))):
        yield _against(
            f"{KEY}.masking.{used[0]} has no effect: no dataset is masked by the plug-in.",
            f"give one `type: {STRATEGY}`, or remove `{used[0]}`.",
        )


def _packing(settings: Settings, data: Mapping[str, Any]) -> Iterator[Finding]:
    who = packer(settings, data)
    if settings.packing is None or who is None:
        return
    off = f"`{KEY}.packing: false`"
    if who == "sft_plugins" and data.get("sample_packing"):
        yield _against(
            f"`sample_packing: true` and {KEY}.packing.by: sft_plugins would pack twice.",
            f"remove `sample_packing`, or set `{KEY}.packing.by: axolotl`, which makes Axolotl's own packing exact.",
        )
    if who == "axolotl" and not data.get("sample_packing"):
        yield _against(
            f"{KEY}.packing.by: axolotl leaves packing to Axolotl, and `sample_packing` is not true.",
            f"set `sample_packing: true`, or `{KEY}.packing.by: sft_plugins`.",
        )
    own = [name for name in PackingSettings.model_fields if name in settings.packing.model_fields_set - {"by"}]
    if who == "axolotl" and own:
        yield _against(
            f"{KEY}.packing.{own[0]} is for our own packing, and here `sample_packing: true` packs.",
            f"remove `{own[0]}`, or `sample_packing`.",
        )
    if who == "sft_plugins":
        yield from _own_packing(data, off)
    for name in ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"):
        if (data.get(name) or 1) > 1:
            yield _against(
                f"`{name}: {data[name]}` splits rows: documents cannot be isolated.", f"remove it, or set {off}.", "P15"
            )
    nested = field(data.get("context_parallel") or {}, "size")  # Axolotl 0.21's own plug-in
    if (nested or 1) > 1:
        yield _against(
            f"`context_parallel.size: {nested}` splits rows: documents cannot be isolated.",
            f"remove it, or set {off}.",
            "P15",
        )
    yield from _fsdp(data, off)
    if _zero_stage(data.get("deepspeed")) == 3:
        yield _against(
            "`deepspeed` stage 3 shards the model before isolation can be proved on it.", f"use stage 2, or set {off}."
        )
    if data.get("batch_flattening"):
        yield _against("`batch_flattening` flattens rows a second time.", f"remove it, or set {off}.")


def _fsdp(data: Mapping[str, Any], off: str) -> Iterator[Finding]:
    """FSDP2 shards a model that was loaded whole and isolated; everything else has no whole model to prove isolation on."""
    name = _fsdp_key(data)
    if name is None:
        return
    options = data.get("fsdp_config") or {}
    version = data.get("fsdp_version") or field(options, "fsdp_version") or field(options, "version")
    if str(version) != "2":
        yield _against(
            f"`{name}` without `fsdp_version: 2` wraps the model so that documents cannot be isolated.",
            f"set `fsdp_version: 2`, use DDP, or set {off}.",
        )
    for loading in ("cpu_ram_efficient_loading", "fsdp_cpu_ram_efficient_loading"):
        if field(options, loading):
            yield _against(
                f"`fsdp_config.{loading}: true` loads weights on one rank only, and the others have none to prove "
                "isolation on.",
                f"remove it, or set {off}.",
            )


def _fsdp_key(data: Mapping[str, Any]) -> str | None:
    return next((name for name in ("fsdp", "fsdp_config") if data.get(name)), None)


def _collapse(settings: Settings, data: Mapping[str, Any]) -> Iterator[Finding]:
    if settings.collapse is None:
        return
    sharding = [f"`{name}`"] if (name := _fsdp_key(data)) is not None else []
    if _zero_stage(data.get("deepspeed")) == 3:
        sharding.append("`deepspeed` stage 3")
    for what in sharding:
        yield _against(
            f"{what} shards the weights, and {KEY}.collapse looks at whole ones.",
            f"set `{KEY}.collapse: false`, or use DDP.",
        )


def _own_packing(data: Mapping[str, Any], off: str) -> Iterator[Finding]:
    if data.get("sequence_len") is None:
        yield _against(
            f"{KEY}.packing needs `sequence_len`, the tokens of a packed row.", f"set `sequence_len`, or {off}."
        )
    reorders = f"remove it, or set {off}."
    if data.get("eval_sample_packing"):
        yield _against(f"`eval_sample_packing` without `sample_packing` contradicts {KEY}.packing.", reorders)
    if data.get("curriculum_sampling"):
        yield _against("`curriculum_sampling` keeps the order of rows, and packing changes it.", reorders)
    if data.get("group_by_length"):
        yield _against("`group_by_length` sorts rows by length, and packed rows are all full.", reorders)
    if data.get("remove_unused_columns"):
        yield _against("`remove_unused_columns: true` would remove where documents end.", reorders)


def _zero_stage(deepspeed: Any) -> int | None:
    """The ZeRO stage of a DeepSpeed configuration, a mapping or the path of a JSON file."""
    if isinstance(deepspeed, str) and Path(deepspeed).is_file():
        try:
            deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AssetError(
                f"`deepspeed: {deepspeed}` cannot be read as JSON: {error}.",
                code="bad_config",
                remedy="correct the file.",
            ) from error
    zero = deepspeed.get("zero_optimization") if isinstance(deepspeed, Mapping) else None
    return zero.get("stage") if isinstance(zero, Mapping) else None
