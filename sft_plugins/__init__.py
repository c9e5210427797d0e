"""Drop-in components for open-source LLM trainers: exact masking, exact packing, collapse alarm."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_plugins.collapse import ModeCollapseCallback as ModeCollapseCallback
    from sft_plugins.errors import CollapseError as CollapseError
    from sft_plugins.errors import ContaminationError as ContaminationError
    from sft_plugins.errors import MaskingError as MaskingError
    from sft_plugins.errors import PackingError as PackingError
    from sft_plugins.errors import SFTPluginsError as SFTPluginsError
    from sft_plugins.masking import PromptMasker as PromptMasker
    from sft_plugins.masking import StrictPromptMaskingCollator as StrictPromptMaskingCollator
    from sft_plugins.masking import check_masks as check_masks
    from sft_plugins.masking import mask_dataset as mask_dataset
    from sft_plugins.packing import BlockDiagonalPackingCollator as BlockDiagonalPackingCollator
    from sft_plugins.packing import check_isolation as check_isolation
    from sft_plugins.packing import isolate as isolate
    from sft_plugins.packing import pack_dataset as pack_dataset
    from sft_plugins.packing import pack_stream as pack_stream
    from sft_plugins.packing import plan_packs as plan_packs

__version__ = "0.2.0"


def on_demand(
    package: str, *tables: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose modules are imported when first asked for one of the names that tables
    give each.
    """
    home = {name: module for table in tables for module, names in table.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *home})


# The command line answers `--help` without loading torch.
_NAMES = {
    "errors": ("SFTPluginsError", "MaskingError", "PackingError", "ContaminationError", "CollapseError"),
    "masking": ("PromptMasker", "StrictPromptMaskingCollator", "check_masks", "mask_dataset"),
    "packing": (
        "BlockDiagonalPackingCollator",
        "check_isolation",
        "isolate",
        "pack_dataset",
        "pack_stream",
        "plan_packs",
    ),
    "collapse": ("ModeCollapseCallback",),
}
__all__ = sorted(name for names in _NAMES.values() for name in names)
if not TYPE_CHECKING:  # which shall complain of any other name
    __getattr__, __dir__ = on_demand(__name__, _NAMES)
