"""Packing in which no document sees another."""

from sft_plugins.packing.collator import BlockDiagonalPackingCollator
from sft_plugins.packing.dataset import Packed, pack_dataset
from sft_plugins.packing.isolation import IsolationReport, check_isolation, isolate
from sft_plugins.packing.plan import PackPlan, plan_packs
from sft_plugins.packing.report import PackReport
from sft_plugins.packing.stream import PackStream, pack_stream

__all__ = [
    "BlockDiagonalPackingCollator",
    "IsolationReport",
    "PackPlan",
    "PackReport",
    "PackStream",
    "Packed",
    "check_isolation",
    "isolate",
    "pack_dataset",
    "pack_stream",
    "plan_packs",
]
