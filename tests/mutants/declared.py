"""What is known of single faults: `equivalents.yaml`, which change nothing anybody could see, and `survivors.yaml`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


@functools.cache
def entries(name: str) -> list[dict[str, str]]:
    """Each with `file`, `statement`, `was`, `is` and `why` (equivalents) or `changes` (survivors)."""
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8")) or []


def equivalent(fault: Mapping[str, Any]) -> str | None:
    """Why nobody could see this fault, where that is declared."""
    return _said("equivalents.yaml", fault, "why")


def change(fault: Mapping[str, Any]) -> str | None:
    """What a survivor would change."""
    return _said("survivors.yaml", fault, "changes")


def _said(name: str, fault: Mapping[str, Any], key: str) -> str | None:
    wanted = [fault[part] for part in ("file", "statement", "was", "is")]
    return next((e[key] for e in entries(name) if [e[p] for p in ("file", "statement", "was", "is")] == wanted), None)
