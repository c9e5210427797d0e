"""What each host trainer needs. The core never imports this package; this package imports the core absolutely."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft_plugins import on_demand

if TYPE_CHECKING:
    from sft_plugins.integrations.config_file import Overrides as Overrides
    from sft_plugins.integrations.config_file import read_plan as read_plan
    from sft_plugins.integrations.layouts import Manifest as Manifest
    from sft_plugins.integrations.layouts import layout_of as layout_of
    from sft_plugins.integrations.layouts import write_rows as write_rows

# On demand: a host that loads its plug-in reads no configuration of another.
_NAMES = {
    "config_file": ("Overrides", "read_plan"),
    "layouts": ("Manifest", "layout_of", "write_rows"),
}
__all__ = sorted(name for names in _NAMES.values() for name in names)
if not TYPE_CHECKING:  # which shall complain of any other name
    __getattr__, __dir__ = on_demand(__name__, _NAMES)
