"""What is raised for models, data and packages that are not there or cannot be used."""

from __future__ import annotations

from sft_plugins.errors import SFTPluginsError


class AssetError(SFTPluginsError):
    """A model, a data file or a package that a check needs is missing or unreadable."""
