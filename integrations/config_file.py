"""Configurations of Axolotl and TRL, read into the one `Plan` that preflight checks.

config.yaml ── read_plan ──► Plan       `base_model:` is Axolotl's word, `model_name_or_path:`, `dataset_name:` TRL's
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sft_plugins.errors import AssetError
from sft_plugins.integrations.axolotl.preflight import read_axolotl
from sft_plugins.integrations.config_settings import Overrides
from sft_plugins.integrations.trl.preflight import read_trl
from sft_plugins.preflight import Plan

__all__ = ["Overrides", "read_plan"]

_AXOLOTL = {"base_model", "sequence_len", "micro_batch_size", "dataset_prepared_path", "adapter"}
_TRL = {"model_name_or_path", "dataset_name", "max_length", "per_device_train_batch_size", "use_peft"}


def read_plan(path: str | Path, overrides: Overrides | None = None) -> Plan:
    """What the configuration at `path` is going to train.

    Args:
        path: an Axolotl YAML, or a YAML or JSON file of TRL's arguments (`trl sft --config`, `SFTConfig` as JSON).
        overrides: what the configuration leaves out, or what is to be tried in its place.

    Raises:
        AssetError: `missing_file`, `unreadable`, `bad_config` (naming line and column), `unknown_key`,
            `unknown_config`, `no_model`, `no_data`.
    """
    overrides = overrides or Overrides()
    data = _mapping(Path(path))
    is_axolotl, is_trl = len(_AXOLOTL & set(data)), len(_TRL & set(data))
    if is_axolotl == is_trl and "base_model" not in data and not overrides.model:
        raise AssetError(
            f"{path}: neither an Axolotl nor a TRL configuration; found the keys {', '.join(map(str, list(data)[:12]))}.",
            code="unknown_config",
            remedy="An Axolotl YAML has `base_model:`; TRL's arguments have `model_name_or_path:` and `dataset_name:`.",
        )
    read = read_axolotl if "base_model" in data or is_axolotl > is_trl else read_trl
    plan, known = read(data, str(path), overrides)
    if known is not None:
        _refuse_unknown(data, known, path, plan.host)
    return plan


def _mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise AssetError(
            f"{path}: there is no such file.", code="missing_file", remedy="Give a YAML or JSON file."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise AssetError(f"{path} cannot be read: {error}", code="unreadable", remedy="Check the file.") from error
    try:
        data = yaml.safe_load(text)  # JSON is YAML, and a tab that only JSON allows is rare
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise AssetError(
            f"{path}{place}: not valid YAML: {problem}.",
            code="bad_config",
            remedy="Mend that line; quote text that holds `: ` or begins with a bracket.",
        ) from error
    if not isinstance(data, dict):
        raise AssetError(
            f"{path} holds {'nothing' if data is None else type(data).__name__}; keys with values were expected.",
            code="bad_config",
            remedy="Give an Axolotl YAML, or TRL's arguments.",
        )
    return data


def _refuse_unknown(data: Mapping[str, Any], known: Iterable[str], path: str | Path, host: str) -> None:
    """A key that the host does not know: it ignores it (Axolotl), or stops after everything was loaded (TRL)."""
    names = set(known)
    for key in data:
        if key not in names:
            close = difflib.get_close_matches(str(key), sorted(names), n=1)
            hint = f"Did you mean `{close[0]}`?" if close else "Remove it, or add the plug-in that reads it."
            raise AssetError(f"{path}: `{key}` is no key of {host}.", code="unknown_key", remedy=hint)
