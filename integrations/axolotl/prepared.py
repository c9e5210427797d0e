"""A folder of prepared data for every way of masking: what Axolotl keeps on disk is never served to another one.

Axolotl finds prepared rows under `dataset_prepared_path/<hash>`, and its hash knows neither our settings nor what a
tokenizer's files say. So rows masked by our strategy are prepared under

    <dataset_prepared_path>/sft_plugins-<hash of settings, template settings, tokenizer files, data files, version>
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from sft_plugins import __version__
from sft_plugins.integrations.axolotl.settings import Settings, dataset_entries, field, is_ours

_DEFAULT = "last_run_prepared"  # Axolotl's own
_PREFIX = "sft_plugins-"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_CONFIG_KEYS = (
    "base_model",
    "tokenizer_config",
    "tokenizer_type",
    "revision_of_model",
    "sequence_len",
    "chat_template",
    "chat_template_jinja",
    "default_system_message",
    "special_tokens",
    "tokens",
    "eot_tokens",
    "added_tokens_overrides",
)


def separate_prepared_path(settings: Settings, data: Mapping[str, Any]) -> str | None:
    """`dataset_prepared_path` for this way of masking; None where no dataset is masked by our strategy."""
    if settings.masking is None or not any(map(is_ours, dataset_entries(data))):
        return None
    base = Path(data.get("dataset_prepared_path") or _DEFAULT)
    if base.name.startswith(_PREFIX):  # validated a second time, as Ray's workers do
        base = base.parent
    return str(base / f"{_PREFIX}{_fingerprint(settings, data)}")


def _fingerprint(settings: Settings, data: Mapping[str, Any]) -> str:
    assert settings.masking is not None
    facts = [
        __version__,
        settings.masking.model_dump(exclude={"audit"}),
        {key: str(data[key]) for key in _CONFIG_KEYS if data.get(key) is not None},
        [_entry(entry) for entry in dataset_entries(data)],
        list(_tokenizer(data)),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _entry(entry: Any) -> list[Any]:
    """A dataset's settings, and size and time of the file it names."""
    values = entry if isinstance(entry, Mapping) else entry.model_dump(exclude_none=True)
    path = Path(str(field(entry, "path")))
    stat = path.stat() if path.is_file() else None
    return [
        {str(key): value for key, value in values.items() if value is not None},
        stat and [stat.st_size, stat.st_mtime_ns],
    ]


def _tokenizer(data: Mapping[str, Any]) -> Iterator[str]:
    """Digests of the tokenizer's files, in a local folder or in the hub's cache; a file not there yet has none."""
    name = str(data.get("tokenizer_config") or data.get("base_model"))
    for file in _TOKENIZER_FILES:
        path: Any = Path(name) / file
        if not Path(name).is_dir():
            path = _cached(name, file, data.get("revision_of_model"))
        if path is not None and Path(path).is_file():
            yield f"{file} {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"


def _cached(name: str, file: str, revision: str | None) -> str | None:
    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # no hub id
        return None
    return found if isinstance(found, str) else None
