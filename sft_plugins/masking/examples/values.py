"""Values as data holds them: JSON text, the holes that columnar storage fills, blank fields, and the error for what is wrong.

Arrow's own types come back by themselves. What differs from row to row, `datasets` keeps as JSON text (its `Json` feature,
which `load_dataset("json")` chooses by itself for messages of which only some have tool calls):

    feature  messages: List(Json())      stored  ['{"role": "user", …}', …]      row  [{"role": "user", …}, …]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from typing import Any

from datasets import Json

from sft_plugins.errors import MaskingError


class Written(dict[str, Any]):
    """A mapping read from JSON text. What is null in it somebody wrote; columnar storage fills no holes there."""


def read_json(text: str, where: str) -> Any:
    """The value of JSON text, with every mapping a `Written` one.

    Raises:
        MaskingError: `bad_schema` for text that is no JSON, is nested too deeply, or names a key twice in one mapping.
    """
    try:
        return json.loads(text, object_pairs_hook=_written)
    except json.JSONDecodeError as error:
        raise schema_error(f"{where} is a string that is not JSON ({error}).", "Correct the JSON text.") from error
    except RecursionError as error:
        raise too_deep(where) from error
    except _TwiceError as error:
        raise schema_error(
            f"{where} is JSON text that names the key {error.args[0]!r} twice in one mapping.", "Keep one of them."
        ) from error


def drop_none(value: Any) -> Any:
    """`value` without the mapping entries that are `None`, at every depth. Arrow fills missing struct fields with them.

    The arguments of a call that were read from JSON text keep theirs: a null among them is part of the answer.
    """
    if isinstance(value, Mapping):
        return {
            key: item if key == "arguments" and isinstance(item, Written) else drop_none(item)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, (list, tuple)):
        return [drop_none(item) for item in value]
    return value


def json_columns(features: Mapping[str, Any] | None) -> dict[str, Any]:
    """The features, by column, that hold JSON text anywhere."""
    return {name: feature for name, feature in (features or {}).items() if _holds_json(feature)}


def with_json_read(row: dict[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with the JSON text in `columns` (from `json_columns`) read."""
    return row | {name: _stored(row[name], feature) for name, feature in columns.items()}


def is_blank(value: Any) -> bool:
    """Whether nothing was written there: None, white space, JSON text of nothing, or an empty list or mapping."""
    if isinstance(value, str):
        return value.strip() in ("", "null", "[]", "{}")
    return value is None or (isinstance(value, Sized) and not len(value))


def leaves(value: Any) -> list[str]:
    """The strings in `value` at every depth, keys of mappings included."""
    if isinstance(value, str):
        return [value]
    if value is None:  # as in most rows, and quicker told than what follows
        return []
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in (str(key), *leaves(item))]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in leaves(item)]
    return []


def check_text(text: str, where: str) -> None:
    """Refuse lone surrogates: they cannot be encoded as UTF-8, and tokenizers fail on them without saying where."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise schema_error(
            f"{where} holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}.",
            "Repair the text's encoding, for example with .encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').",
        ) from error


def schema_error(message: str, remedy: str) -> MaskingError:
    return MaskingError(message, code="bad_schema", remedy=remedy)


def ignoring(*names: str) -> str:
    """For a remedy: the option that leaves columns, or keys of messages, out."""
    return f"{{ignore_columns:ignore_columns={list(names)!r}}}"


def too_deep(where: str) -> MaskingError:
    return schema_error(f"{where} is nested too deeply to be read.", "Flatten it, or drop the row.")


class _TwiceError(ValueError):
    """A key that stands twice in one JSON object: reading it would lose one of the values."""


def _written(pairs: list[tuple[str, Any]]) -> Written:
    made = Written(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return made


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_holds_json, feature.values()))
    inner = getattr(feature, "feature", None)  # of a list
    return isinstance(feature, Json) or (inner is not None and _holds_json(inner))


def _stored(value: Any, feature: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, Json):
        return read_json(value, "a column of the feature `Json`")
    if isinstance(feature, Mapping):
        return {name: _stored(value[name], inner) for name, inner in feature.items()}
    if not _holds_json(feature):
        return value
    return [_stored(item, feature.feature) for item in value]
