"""The data sets of an Axolotl YAML, as `DataEntry`: where rows lie, how their fields are called, what masks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sft_plugins.errors import AssetError, MaskingError
from sft_plugins.integrations.axolotl.fields import RowFields
from sft_plugins.integrations.axolotl.preflight.steps import sharded
from sft_plugins.integrations.axolotl.settings import Settings, is_ours
from sft_plugins.integrations.config_file import Overrides, entries_of, needed, switch
from sft_plugins.preflight import DataEntry, read_text

_PLACES = (
    "field_messages", "field_system", "field_tools", "message_property_mappings", "message_field_training", "roles",
)  # fmt: skip
_USER_DEFINED = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
}
_FALLBACK = "tokenizer_default_fallback_"


def entries(data: Mapping[str, Any], path: str, overrides: Overrides, settings: Settings | None) -> Iterator[DataEntry]:
    """Every source of rows; `settings` of the plug-in where it masks."""
    if overrides.data:
        first = next(iter(entries_of(data, "datasets", path)), {"type": "chat_template"})
        yield _entry({"path": overrides.data, "type": first.get("type")}, "--data", data, overrides, settings, path)
        return
    if not data.get("datasets"):
        raise AssetError(f"{path} names no data.", code="no_data", remedy="Add `datasets:`, or give --data.")
    for name in ("datasets", "test_datasets"):
        for index, entry in enumerate(entries_of(data, name, path)):
            yield _entry(entry, f"{name}[{index}]", data, overrides, settings, path)


def _entry(
    entry: Mapping[str, Any],
    where: str,
    data: Mapping[str, Any],
    overrides: Overrides,
    settings: Settings | None,
    path: str,
) -> DataEntry:
    masking = settings.masking if settings is not None and (is_ours(entry) or overrides.components) else None
    exact = masking is not None
    kind = entry.get("type")
    everything = switch(data, "train_on_inputs") or kind == "completion"
    template, unknown = template_of(entry, data)
    return DataEntry(
        where=where,
        path=needed(
            entry.get("path"), code="no_data", what=f"`path` in {where}", path=path, remedy="Give a file or folder."
        ),
        split=entry.get("split"),
        select=sharded(entry, data, path),
        evaluation=where.startswith("test_"),
        exact=exact,
        trains="everything" if everything and not exact else "answers",
        rename=_rename(entry, strict=exact and is_ours(entry)),
        chat_template=template,
        template_unknown=unknown,
        renders=exact or renders(entry),
        masking={} if masking is None else {**masking.model_dump(exclude={"audit", "errors"}), **overrides.masking},
        drops=masking is not None and masking.errors == "drop",
        text_field=(entry.get("field") or "text") if kind == "completion" else None,
    )


def renders(entry: Mapping[str, Any]) -> bool:
    """Whether Axolotl writes these rows by a chat template (or as they stand), so that what it trains can be judged."""
    return is_ours(entry) or entry.get("type") in (None, "chat_template", "completion")


def template_of(entry: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The template that Axolotl would take, None for the tokenizer's own; and whether it is one that only Axolotl knows."""
    own = entry.get("chat_template")
    choice = str(own or data.get("chat_template") or "tokenizer_default")
    text = (entry if own else data).get("chat_template_jinja") or entry.get("chat_template_jinja")
    if text:
        return read_text(text) if _is_file(text) else str(text), False
    if choice == "tokenizer_default":
        return None, False
    if choice == "jinja":
        raise AssetError(
            "`chat_template: jinja` without `chat_template_jinja:`.",
            code="bad_config",
            remedy="Give its text or file.",
        )
    try:
        from axolotl.utils.chat_templates import get_chat_template
    except ImportError:
        return None, True
    try:
        # With a fallback the tokenizer's own comes first; it is not known here, and stands where the template is None.
        return (None, True) if choice.startswith(_FALLBACK) else (str(get_chat_template(choice)), False)
    except ValueError as error:
        raise AssetError(f"`chat_template: {choice}`: {error}", code="bad_config", remedy="Correct it.") from error


def _is_file(text: str) -> bool:
    return len(text) < 4096 and "{" not in text and Path(text).is_file()


def _rename(entry: Mapping[str, Any], *, strict: bool) -> Callable[[Mapping[str, Any]], dict[str, Any]] | None:
    """The entry's field names; for Axolotl's own strategies only those that say where things are."""
    kind = entry.get("type")
    if isinstance(kind, Mapping):  # a prompt in the user's own words, of columns that are named here
        names = {str(kind[field]): column for field, column in _USER_DEFINED.items() if kind.get(field)}
        return lambda row: {names.get(column, column): value for column, value in row.items()}
    if not strict:
        entry = {name: entry[name] for name in _PLACES if entry.get(name)}
    try:
        fields = RowFields.of(entry)
    except MaskingError as error:
        raise AssetError(error.message, code="bad_config", remedy=error.remedy) from error
    return None if fields.change_nothing else fields.rename
