"""HTML pages of the commands: `base.html.j2` is the shell of every one of them, and `write_page` puts one on disk.

Invariant: a page is one file that loads nothing, so it works offline, by mail and from a cluster's scratch folder.
"""

from __future__ import annotations

from pathlib import Path

from sft_plugins._report import render_page
from sft_plugins.errors import AssetError

__all__ = ["render_page", "write_page"]


def write_page(path: Path, html: str) -> Path:
    """Write `html` to `path`, making its folder.

    Raises:
        AssetError: `unwritable`, where there is no permission, no space, or a folder of that name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise AssetError(
            f"--html {path}: the page cannot be written: {error.strerror or error}",
            code="unwritable",
            remedy="give a file in a folder that you can write to.",
        ) from error
    return path
