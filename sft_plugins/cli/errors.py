"""What the command line raises for models, data and packages that are not there."""

from __future__ import annotations

from sft_plugins.errors import SFTPluginsError


class AssetError(SFTPluginsError):
    """A model, a data file or a package that a command needs is missing or unreadable."""
