"""The `Plan` of an Axolotl YAML, put together of what the modules beside this one read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sft_plugins.errors import AssetError
from sft_plugins.integrations.axolotl.preflight.entries import entries, template_of
from sft_plugins.integrations.axolotl.preflight.findings import config_findings, other_training
from sft_plugins.integrations.axolotl.preflight.keys import known_keys
from sft_plugins.integrations.axolotl.preflight.steps import count_steps, trained_rows
from sft_plugins.integrations.axolotl.preflight.tokenizer import prepare
from sft_plugins.integrations.axolotl.settings import KEY, PLUGIN, Settings, packer
from sft_plugins.integrations.config_file import KnownKeys, Overrides, needed, number, switch
from sft_plugins.preflight import Plan

_OLD_ATTENTION = {
    "xformers_attention": "xformers", "sage_attention": "sage", "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager",
}  # fmt: skip
"""Axolotl's older switches, the first that is set counts."""


def read(data: Mapping[str, Any], path: str, overrides: Overrides) -> tuple[Plan, KnownKeys]:
    """The plan, and the keys that Axolotl and the plug-ins of this file are known to read."""
    model = needed(
        overrides.model or data.get("base_model"),
        code="no_model",
        what="model",
        path=path,
        remedy="Add `base_model:`, or give --model.",
    )
    settings = _settings(data, path, overrides)
    masks = settings is not None and settings.masking is not None
    own = packer(settings, data) if settings is not None else None
    who = "sft_plugins" if own == "sft_plugins" else "host" if switch(data, "sample_packing") else None
    keys = known_keys(data)
    other = other_training(data)
    plan = Plan(
        host="Axolotl",
        path=path,
        model=model,
        tokenizer=str(data.get("tokenizer_config") or model),
        attn_implementation=data.get("attn_implementation") or _old_attention(data),
        entries=() if other else tuple(entries(data, path, overrides, settings if masks else None)),
        max_length=int(number(data, "sequence_len", 512, path)),
        packer=None if other else who,  # type: ignore[arg-type]
        isolated=settings is not None and settings.packing is not None,
        packs_evaluation=bool(data.get("val_set_size") or data.get("test_datasets"))
        and switch(data, "eval_sample_packing", default=who is not None),
        batch_size=int(number(data, "micro_batch_size", 1, path)),
        accumulation=int(number(data, "gradient_accumulation_steps", 1, path)),
        epochs=number(data, "num_epochs", 1, path),
        devices=overrides.devices,
        max_steps=int(number(data, "max_steps", 1, path)) if data.get("max_steps") else None,
        findings=tuple(config_findings(data, settings, path, keys)),
        prepare=partial(prepare, data=data, path=path, template=template_of({}, data)[0]),
        trained_rows=trained_rows(data, path),
        count_steps=count_steps(data),
    )
    return plan, keys


def _settings(data: Mapping[str, Any], path: str, overrides: Overrides) -> Settings | None:
    """What stands under `sft_plugins:`, or None where the plug-in is not loaded."""
    if not overrides.components and not any(str(p).replace(":", ".") == PLUGIN for p in data.get("plugins") or ()):
        if data.get(KEY) is not None:
            raise AssetError(
                f"{path}: `{KEY}:` is set, but the plug-in is not in `plugins:`, so nothing reads it.",
                code="unknown_key",
                remedy=f"Add `- {PLUGIN}` to `plugins:`.",
            )
        return None
    try:
        return Settings.read(data.get(KEY))
    except ValueError as error:
        raise AssetError(f"{path}: {error}", code="bad_config", remedy=f"Correct `{KEY}:`.") from error


def _old_attention(data: Mapping[str, Any]) -> str | None:
    return next((value for name, value in _OLD_ATTENTION.items() if data.get(name)), None)
