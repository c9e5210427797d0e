"""Drop-in components for open-source LLM trainers: exact masking, exact packing, collapse alarm."""

from __future__ import annotations

import importlib
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

# Imported when first used: the command line answers `--help` without loading torch.
_PUBLIC = {
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
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
