"""Masked rows in the layout that a trainer reads: columns, files, a manifest, and the lines that make the trainer use them.

write_rows(masked, folder, to="llamafactory", …)  →  folder/rows/          what the trainer is pointed to
                                                      folder/manifest.json  what the rows are, and how they were made
                                                      folder/use.yaml       the lines of configuration
"""

from sft_plugins.integrations.layouts.hosts import LAYOUTS, Layout, layout_of
from sft_plugins.integrations.layouts.writing import Manifest, write_rows

__all__ = ["LAYOUTS", "Layout", "Manifest", "layout_of", "write_rows"]
