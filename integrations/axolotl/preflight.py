"""An Axolotl YAML → `Plan`. With our plug-in in it, what the plug-in will do; without, what Axolotl does by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sft_plugins.errors import AssetError, MaskingError
from sft_plugins.integrations.axolotl.fields import RowFields
from sft_plugins.integrations.axolotl.settings import KEY, PLUGIN, Settings, is_ours, packer
from sft_plugins.integrations.axolotl.validation import contradictions
from sft_plugins.integrations.config_file import Overrides, entries_of, needed, number, of_config, switch
from sft_plugins.preflight import DataEntry, Finding, Plan

# Roles under the names that Axolotl's own row forms use.
_ROLES = {"assistant", "gpt", "model", "chatgpt", "bot", "user", "human", "system", "tool", "function"}
_CONTEXT_PARALLEL = ("context_parallel_size", "sequence_parallel_degree")


def read(data: Mapping[str, Any], path: str, overrides: Overrides) -> tuple[Plan, set[str] | None]:
    """The plan, and every key that the installed Axolotl and its plug-ins know (None without Axolotl)."""
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
    plan = Plan(
        host="Axolotl",
        path=path,
        model=model,
        tokenizer=str(data.get("tokenizer_config") or model),
        attn_implementation=data.get("attn_implementation") or _old_attention(data),
        entries=tuple(_entries(data, path, overrides, settings if masks else None)),
        max_length=int(number(data, "sequence_len", 512, path)),
        packer=who,  # type: ignore[arg-type]
        isolated=settings is not None and settings.packing is not None,
        packs_evaluation=bool(data.get("val_set_size") or data.get("test_datasets"))
        and switch(data, "eval_sample_packing", default=who is not None),
        batch_size=int(number(data, "micro_batch_size", 1, path)),
        accumulation=int(number(data, "gradient_accumulation_steps", 1, path)),
        epochs=number(data, "num_epochs", 1, path),
        devices=overrides.devices,
        findings=tuple(_findings(data, settings, path)),
    )
    return plan, _known_keys(data)


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


def _entries(
    data: Mapping[str, Any], path: str, overrides: Overrides, settings: Settings | None
) -> Iterator[DataEntry]:
    if overrides.data:
        yield _entry({"path": overrides.data, "type": _type_of_first(data)}, "--data", data, overrides, settings, path)
        return
    if not data.get("datasets"):
        raise AssetError(f"{path} names no data.", code="no_data", remedy="Add `datasets:`, or give --data.")
    for name in ("datasets", "test_datasets"):
        for index, entry in enumerate(entries_of(data, name, path)):
            yield _entry(entry, f"{name}[{index}]", data, overrides, settings, path)


def _type_of_first(data: Mapping[str, Any]) -> Any:
    return next((entry.get("type") for entry in entries_of(data, "datasets", "--data")), "chat_template")


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
    return DataEntry(
        where=where,
        path=needed(
            entry.get("path"), code="no_data", what=f"`path` in {where}", path=path, remedy="Give a file or folder."
        ),
        split=entry.get("split"),
        evaluation=where.startswith("test_"),
        exact=exact,
        trains="everything" if everything and not exact else "answers",
        rename=_rename(entry, strict=exact and is_ours(entry)),
        chat_template=_template(entry, data),
        masking={} if masking is None else masking.model_dump(exclude={"audit", "errors"}),
        drops=masking is not None and masking.errors == "drop",
        text_field=(entry.get("field") or "text") if kind == "completion" else None,
    )


def _template(entry: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    """The template that Axolotl would take, None for the tokenizer's own and for one that only Axolotl knows."""
    choice = entry.get("chat_template") or data.get("chat_template")
    text = entry.get("chat_template_jinja") or data.get("chat_template_jinja")
    if text:
        return Path(text).read_text(encoding="utf-8") if _is_file(text) else str(text)
    if choice is None or str(choice).startswith("tokenizer_default"):
        return None
    try:
        from axolotl.utils.chat_templates import get_chat_template
    except ImportError:
        return None  # and `_entry_findings` says so
    try:
        return str(get_chat_template(choice))
    except ValueError as error:
        raise AssetError(f"`chat_template: {choice}`: {error}", code="bad_config", remedy="Correct it.") from error


def _is_file(text: str) -> bool:
    return len(text) < 4096 and "{" not in text and Path(text).is_file()


def _rename(entry: Mapping[str, Any], *, strict: bool) -> Any:
    """The entry's field names; for Axolotl's own strategies only those that say where things are."""
    if not strict:
        places = (
            "field_messages", "field_system", "field_tools", "message_property_mappings", "message_field_training", "roles",
        )  # fmt: skip
        entry = {name: entry[name] for name in places if entry.get(name)}
    try:
        fields = RowFields.of(entry)
    except MaskingError as error:
        raise AssetError(error.message, code="bad_config", remedy=error.remedy) from error
    return None if fields.change_nothing else fields.rename


def _findings(data: Mapping[str, Any], settings: Settings | None, path: str) -> Iterator[Finding]:
    for name in (*_CONTEXT_PARALLEL, "tensor_parallel_size"):
        if data.get(name):
            number(data, name, 1, path)  # refuses what could not be compared
    if settings is not None:
        try:
            yield from contradictions(settings, data)
        except AssetError as error:
            raise AssetError(f"{path}: {error.message}", code=error.code, remedy=error.remedy) from error
    else:
        for name in _CONTEXT_PARALLEL:
            if (data.get(name) or 1) > 1 and switch(data, "sample_packing"):
                yield of_config(
                    "error",
                    "context_parallel",
                    name,
                    "context parallelism splits packed rows over devices; documents cannot be isolated.",
                    f"Remove `{name}`, or `sample_packing`.",
                    "P15",
                )
    for index, entry in enumerate(entries_of(data, "datasets", "datasets")):
        yield from _entry_findings(entry, f"datasets[{index}]", data)


def _entry_findings(entry: Mapping[str, Any], where: str, data: Mapping[str, Any]) -> Iterator[Finding]:
    known = _ROLES | set(entry.get("roles") or {})
    for role in entry.get("roles_to_train") or data.get("roles_to_train") or ():
        if role not in known:
            yield of_config(
                "error",
                "unknown_role",
                f"{where}.roles_to_train",
                f"`{role}` is no role: Axolotl trains nothing for it, and says nothing.",
                "Write `assistant`, or map the role under `roles:`.",
                "M12",
            )
    named = entry.get("chat_template") or data.get("chat_template") or "tokenizer_default"
    if not str(named).startswith(("tokenizer_default", "jinja")) and not find_spec("axolotl"):
        yield of_config(
            "warning",
            "template_not_checked",
            f"{where}: chat_template: {named}",
            "this template comes with Axolotl, which is not installed here: the tokenizer's own was checked in its place.",
            "Run preflight where Axolotl is installed, or set `chat_template: tokenizer_default`.",
        )
    if not is_ours(entry) and entry.get("train_on_eos") in ("none", "last"):
        yield of_config(
            "error" if entry["train_on_eos"] == "none" else "warning",
            "missing_stop",
            f"{where}.train_on_eos",
            f"`train_on_eos: {entry['train_on_eos']}` leaves turns whose stop token is not trained: the model will not stop.",
            "Set `train_on_eos: turn`.",
            "M7",
        )
    if (
        isinstance(entry.get("type"), str)
        and not is_ours(entry)
        and entry["type"] not in ("chat_template", "completion")
    ):
        yield of_config(
            "note",
            "not_rendered",
            f"{where}.type: {entry['type']}",
            "Axolotl writes these prompts in words of its own: the rows are checked here, its text is not.",
            "Run `axolotl preprocess`, then `sft-plugins audit` on its dataset_prepared_path.",
        )


def _old_attention(data: Mapping[str, Any]) -> str | None:
    names = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "flex_attention": "flex_attention"}
    return next((value for name, value in names.items() if data.get(name)), None)


def _known_keys(data: Mapping[str, Any]) -> set[str] | None:
    try:
        from axolotl.utils.schemas.config import AxolotlInputConfig
    except ImportError:
        return None
    names = set()
    for name, model_field in AxolotlInputConfig.model_fields.items():
        names |= {name, *(str(alias) for alias in (model_field.alias, model_field.validation_alias) if alias)}
    return names | {KEY} | _plugin_keys(data)


def _plugin_keys(data: Mapping[str, Any]) -> set[str]:
    """Keys that the configuration's plug-ins add."""
    names: set[str] = set()
    for plugin in data.get("plugins") or ():
        module, _, cls = str(plugin).replace(":", ".").rpartition(".")
        try:
            arguments = getattr(import_module(module), cls)().get_input_args()
        except (ImportError, AttributeError, ValueError) as error:
            raise AssetError(
                f"`plugins: {plugin}` cannot be loaded: {error}.", code="bad_config", remedy="Correct or install it."
            ) from error
        if arguments:
            module, _, cls = arguments.rpartition(".")
            names |= set(getattr(import_module(module), cls).model_fields)
    return names
