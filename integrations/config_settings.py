"""What both readers share: overrides from the command line, and values that a configuration must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft_plugins.errors import AssetError
from sft_plugins.preflight import Finding


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """In place of what the configuration says, or leaves out.

    Attributes:
        model, data: folder or hub id; file or folder.
        devices: number of devices the run will use.
        components: check the run as it would be with sft-plugins' masking, packing and isolation.
    """

    model: str | None = None
    data: str | None = None
    devices: int = 1
    components: bool = False


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


def of_config(level: Any, code: str, where: str, message: str, remedy: str, failure: str = "") -> Finding:
    """A finding that the configuration shows by itself."""
    return Finding(level=level, part="config", code=code, where=where, message=message, remedy=remedy, failure=failure)
