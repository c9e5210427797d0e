"""Configurations of Axolotl and TRL, read into the one `Plan` that preflight checks; and what both readers share.

config.yaml ── read_plan ──► Plan       `base_model:` is Axolotl's word, `model_name_or_path:`, `dataset_name:` TRL's
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sft_plugins.errors import AssetError
from sft_plugins.preflight import Finding, Level, Plan, read_text

_READERS = {"Axolotl": "axolotl.preflight", "TRL": "trl.preflight"}
"""Each host's module with `read(data, path, overrides)`: the plan, and the keys that the host knows."""
_AXOLOTL = {"base_model", "sequence_len", "micro_batch_size", "dataset_prepared_path", "adapter"}
_TRL = {"model_name_or_path", "dataset_name", "max_length", "per_device_train_batch_size", "use_peft"}


@dataclass(frozen=True)
class KnownKeys:
    """Keys that a configuration may have.

    Attributes:
        names: empty where none are known. source: whose they are, `Axolotl 0.19.0`.
        complete: whether they are those of the host that is installed here, and its plug-ins.
        extended_by: plug-ins of the configuration whose keys are not known.
    """

    names: Set[str]
    source: str
    complete: bool
    extended_by: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """In place of what the configuration says, or leaves out.

    Attributes:
        model, data: folder or hub id; file or folder.
        devices: number of devices the run will use.
        components: check the run as it would be with sft-plugins' masking, packing and isolation.
        masking: options of `PromptMasker` by name, over those that an Axolotl YAML gives; TRL's arguments have none.
    """

    model: str | None = None
    data: str | None = None
    devices: int = 1
    components: bool = False
    masking: Mapping[str, Any] = field(default_factory=dict)


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
    host = "Axolotl" if "base_model" in data or is_axolotl > is_trl else "TRL"
    reader = importlib.import_module(f"sft_plugins.integrations.{_READERS[host]}")
    plan: Plan
    known: KnownKeys
    plan, known = reader.read(data, str(path), overrides)
    _refuse_unknown(data, known, path, plan.host)
    return plan


def _mapping(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        data = yaml.safe_load(text)  # JSON is YAML, and a tab that only JSON allows is rare
    except (yaml.YAMLError, ValueError) as error:  # a date that is none raises ValueError
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


def _refuse_unknown(data: Mapping[str, Any], known: KnownKeys, path: str | Path, host: str) -> None:
    """A key that the host does not know: it ignores it (Axolotl), or stops after everything was loaded (TRL).

    Where only the keys of one version are known, a key that resembles none of them may be newer, and is a finding.
    """
    if not known.names or known.extended_by:
        return
    for key in data:
        if key not in known.names:
            close = difflib.get_close_matches(str(key), sorted(known.names), n=1, cutoff=0.6 if known.complete else 0.8)
            if close or known.complete:
                hint = f"Did you mean `{close[0]}`?" if close else "Remove it, or add the plug-in that reads it."
                raise AssetError(f"{path}: `{key}` is no key of {host}.", code="unknown_key", remedy=hint)


# --- what both readers share --------------------------------------------------------------------------------------------


def needed(value: Any, *, code: str, what: str, path: str, remedy: str) -> str:
    """`value` as text.

    Raises:
        AssetError: with `code` where there is none.
    """
    if not value:
        raise AssetError(f"{path} names no {what}.", code=code, remedy=remedy)
    return str(value)


def entries_of(data: Mapping[str, Any], name: str, path: str) -> list[Mapping[str, Any]]:
    """The entries under `name`, one per file: `data_files` of several are several.

    Raises:
        AssetError: `bad_config` where an entry holds no keys and values.
    """
    found: list[Mapping[str, Any]] = []
    given = data.get(name) or ()
    for entry in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(entry, Mapping):
            raise AssetError(
                f"{path}: `{name}` holds {entry!r}; an entry with `path:` was expected.",
                code="bad_config",
                remedy=f"Write `{name}:` as a list, `- path: …` each.",
            )
        files = entry.get("data_files")
        if not files:
            found.append(entry)
            continue
        # A file is read whole: `split` names a part of a saved data set.
        found += [{**entry, "path": file, "split": None} for file in ([files] if isinstance(files, str) else files)]
    return found


def switch(data: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A true-or-false setting; YAML may have left it empty."""
    value = data.get(name)
    return default if value is None else bool(value)


def number(data: Mapping[str, Any], name: str, default: float, path: str) -> float:
    """A positive number.

    Raises:
        AssetError: `bad_config`.
    """
    value = data.get(name)
    if value is None:
        return default
    try:
        converted = float(value)
    except (TypeError, ValueError):
        converted = -1.0
    if isinstance(value, bool) or converted <= 0:
        raise AssetError(
            f"{path}: `{name}: {value}`; expected a number above 0.", code="bad_config", remedy=f"Correct `{name}`."
        )
    return converted


def keys_findings(data: Mapping[str, Any], known: KnownKeys) -> Iterator[Finding]:
    """Keys that nobody here can tell from misspelt ones."""
    unknown = [str(key) for key in data if key not in known.names]
    if known.complete or not unknown:
        return
    reason = (
        f"they may be those of {', '.join(known.extended_by)}" if known.extended_by else "newer, perhaps, or misspelt"
    )
    what = (
        f"no keys of {known.source}: {reason}"
        if known.names
        else f"{known.source} is not installed: its keys are not known"
    )
    yield of_config(
        "warning",
        "keys_not_checked",
        ", ".join(unknown) if known.names else "all keys",
        f"{what}.",
        "Run preflight where the host and its plug-ins are installed.",
        unchecked=f"the keys {', '.join(unknown)}" if known.names else "the names of the keys",
    )


def of_config(
    level: Level, code: str, where: str, message: str, remedy: str, failure: str = "", unchecked: str = ""
) -> Finding:
    """A finding that the configuration shows by itself."""
    return Finding(
        level=level, part="config", code=code, where=where, message=message, remedy=remedy, failure=failure,
        unchecked=unchecked,
    )  # fmt: skip
