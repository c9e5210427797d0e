"""The Axolotl plug-in: exact masking, contamination-free packing and the collapse alarm from three lines of YAML.

plugins:
  - sft_plugins.integrations.axolotl.SFTPlugin
sft_plugins: {}
"""

from sft_plugins.errors import SFTPluginsError

try:
    from sft_plugins.integrations.axolotl.plugin import SFTPlugin
except ImportError as error:  # Axolotl 0.19 swallows an ImportError of a plug-in and trains without it
    raise SFTPluginsError(
        f"the Axolotl plug-in cannot be loaded: {error}.",
        code="unsupported_version",
        remedy="pip install 'sft-plugins[axolotl]'",
    ) from error

__all__ = ["SFTPlugin"]
