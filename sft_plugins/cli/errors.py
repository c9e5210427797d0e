"""`AssetError` under the name that the commands know it by."""

from __future__ import annotations

from sft_plugins.preflight.errors import AssetError

__all__ = ["AssetError"]
