"""The Axolotl plug-in: exact masking, contamination-free packing and the collapse alarm from three lines of YAML.

plugins:
  - sft_plugins.integrations.axolotl.SFTPlugin
sft_plugins: {}
"""

from __future__ import annotations

from typing import Any

from sft_plugins.errors import SFTPluginsError

__all__ = ["SFTPlugin"]


# On demand: what reads a YAML for `sft-plugins preflight` needs our settings, and no Axolotl.
def __getattr__(name: str) -> Any:
    if name != "SFTPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from sft_plugins.integrations.axolotl.plugin import SFTPlugin
    except ImportError as error:  # Axolotl 0.19 swallows an ImportError of a plug-in and trains without it
        raise SFTPluginsError(
            f"the Axolotl plug-in cannot be loaded: {error}.",
            code="unsupported_version",
            remedy="pip install 'sft-plugins[axolotl]'",
        ) from error
    return SFTPlugin
