"""Packing in which no document sees another."""

from sft_plugins.packing.collator import BlockDiagonalPackingCollator
from sft_plugins.packing.dataset import Packed, pack_dataset
from sft_plugins.packing.distributed.deal_rows import BalanceReport, Dealt, check_dealing, deal_rows
from sft_plugins.packing.distributed.even_rows import even_rows
from sft_plugins.packing.distributed.row_cost import RowCost
from sft_plugins.packing.isolation.apply import IsolationReport, check_isolation, isolate
from sft_plugins.packing.plan import PackPlan, plan_packs
from sft_plugins.packing.report import PackReport
from sft_plugins.packing.stream import PackStream, pack_stream

# For the other rooms of this library, which look behind no face; no public names.
from sft_plugins.packing.arrow import TokenColumn as TokenColumn  # isort: skip
from sft_plugins.packing.isolation.boundaries import Boundaries as Boundaries  # isort: skip
from sft_plugins.packing.isolation.forward import installed_backend as installed_backend  # isort: skip
from sft_plugins.packing.isolation.forward import set_aside as set_aside  # isort: skip
from sft_plugins.packing.isolation.probe import Reference as Reference  # isort: skip
from sft_plugins.packing.isolation.probe import logits_of as logits_of  # isort: skip
from sft_plugins.packing.isolation.probe import reference_of as reference_of  # isort: skip
from sft_plugins.packing.report import LOSSES as LOSSES  # isort: skip

__all__ = [
    "BalanceReport",
    "BlockDiagonalPackingCollator",
    "Dealt",
    "IsolationReport",
    "PackPlan",
    "PackReport",
    "PackStream",
    "Packed",
    "RowCost",
    "check_dealing",
    "check_isolation",
    "deal_rows",
    "even_rows",
    "isolate",
    "pack_dataset",
    "pack_stream",
    "plan_packs",
]
