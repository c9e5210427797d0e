"""What each host trainer needs. The core never imports this package; this package imports the core absolutely."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_plugins.integrations.config_file import Overrides as Overrides
    from sft_plugins.integrations.config_file import read_plan as read_plan
    from sft_plugins.integrations.layouts import Manifest as Manifest
    from sft_plugins.integrations.layouts import layout_of as layout_of
    from sft_plugins.integrations.layouts import write_rows as write_rows

# On demand: a host that loads its plug-in reads no configuration of another.
_HOME = {
    "Manifest": "layouts",
    "Overrides": "config_file",
    "layout_of": "layouts",
    "read_plan": "config_file",
    "write_rows": "layouts",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
