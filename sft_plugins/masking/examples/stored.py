"""Rows as Arrow stores them → rows as people wrote them.

Arrow's own types come back by themselves. What differs from row to row, `datasets` keeps as JSON text (its `Json` feature,
which `load_dataset("json")` chooses by itself for messages of which only some have tool calls):

    feature  messages: List(Json())      stored  ['{"role": "user", …}', …]      row  [{"role": "user", …}, …]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Json

from sft_plugins.masking.examples.messages import read_json


def json_columns(features: Mapping[str, Any] | None) -> dict[str, Any]:
    """The features, by column, that hold JSON text anywhere."""
    return {name: feature for name, feature in (features or {}).items() if _holds_json(feature)}


def with_json_read(row: dict[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with the JSON text in `columns` (from `json_columns`) read."""
    return row | {name: _read(row[name], feature) for name, feature in columns.items()}


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_holds_json, feature.values()))
    inner = getattr(feature, "feature", None)  # of a list
    return isinstance(feature, Json) or (inner is not None and _holds_json(inner))


def _read(value: Any, feature: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, Json):
        return read_json(value)
    if isinstance(feature, Mapping):
        return {name: _read(value[name], inner) for name, inner in feature.items()}
    if not _holds_json(feature):
        return value
    return [_read(item, feature.feature) for item in value]
