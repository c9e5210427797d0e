"""What each host trainer needs. The core never imports this package; this package imports the core absolutely."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_plugins.integrations.config_file import Overrides as Overrides
    from sft_plugins.integrations.config_file import read_plan as read_plan

__all__ = ["Overrides", "read_plan"]


# On demand: a host that loads its plug-in reads no configuration of another.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.config_file"), name)
