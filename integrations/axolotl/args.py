"""The key `sft_plugins:` as part of Axolotl's configuration, judged together with the rest of the YAML.

Invariant: in a run whose `plugins:` does not name the plug-in, nothing of it is active. Where it does, a missing
`sft_plugins:` means `sft_plugins: {}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, model_validator

from sft_plugins.integrations.axolotl.prepared import separate_prepared_path
from sft_plugins.integrations.axolotl.settings import KEY, Settings
from sft_plugins.integrations.axolotl.validation import contradictions


def listed(data: Mapping[str, Any]) -> bool:
    """Whether this configuration's `plugins:` names us; Axolotl keeps the plug-ins of earlier runs in one process."""
    return any(str(name).startswith(f"{KEY}.") for name in data.get("plugins") or ())


class SFTPluginsArgs(BaseModel):
    """Joins Axolotl's own configuration class, whose validators run beside this one."""

    # Kept as the YAML has it: Axolotl drops None when it dumps its configuration, and false must stay false.
    sft_plugins: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_sft_plugins(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if not listed(data):
            if data.get(KEY) is not None:
                raise ValueError(
                    f"`{KEY}:` is set, but `plugins:` does not list the plug-in. Remedy: add "
                    "`- sft_plugins.integrations.axolotl.SFTPlugin` to `plugins:`."
                )
            return data
        raw = data.get(KEY)
        settings = Settings.read(raw)
        found = contradictions(settings, data)
        if found:
            raise ValueError("\n".join(found))
        changed = {**data, KEY: {} if raw is None else raw}
        path = separate_prepared_path(settings, changed)
        return changed if path is None else {**changed, "dataset_prepared_path": path}
