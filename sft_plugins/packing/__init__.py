"""Packing in which no document sees another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft_plugins import on_demand

if TYPE_CHECKING:
    from sft_plugins.packing.collator import BlockDiagonalPackingCollator as BlockDiagonalPackingCollator
    from sft_plugins.packing.dataset import Packed as Packed
    from sft_plugins.packing.dataset import pack_dataset as pack_dataset
    from sft_plugins.packing.distributed.deal_rows import BalanceReport as BalanceReport
    from sft_plugins.packing.distributed.deal_rows import Dealt as Dealt
    from sft_plugins.packing.distributed.deal_rows import check_dealing as check_dealing
    from sft_plugins.packing.distributed.deal_rows import deal_rows as deal_rows
    from sft_plugins.packing.distributed.even_rows import even_rows as even_rows
    from sft_plugins.packing.distributed.row_cost import RowCost as RowCost
    from sft_plugins.packing.isolation.apply import IsolationReport as IsolationReport
    from sft_plugins.packing.isolation.apply import check_isolation as check_isolation
    from sft_plugins.packing.isolation.apply import isolate as isolate
    from sft_plugins.packing.plan import PackPlan as PackPlan
    from sft_plugins.packing.plan import plan_packs as plan_packs
    from sft_plugins.packing.report import PackReport as PackReport
    from sft_plugins.packing.stream import PackStream as PackStream
    from sft_plugins.packing.stream import pack_stream as pack_stream

    # For the other rooms of this library, which look behind no face; no public names.
    from sft_plugins.packing.arrow import TokenColumn as TokenColumn  # isort: skip
    from sft_plugins.packing.isolation.boundaries import Boundaries as Boundaries  # isort: skip
    from sft_plugins.packing.isolation.forward import installed_backend as installed_backend  # isort: skip
    from sft_plugins.packing.isolation.forward import set_aside as set_aside  # isort: skip
    from sft_plugins.packing.isolation.probe import Reference as Reference  # isort: skip
    from sft_plugins.packing.isolation.probe import logits_of as logits_of  # isort: skip
    from sft_plugins.packing.isolation.probe import reference_of as reference_of  # isort: skip
    from sft_plugins.packing.report import LOSSES as LOSSES  # isort: skip

# A data set is packed without what models are isolated with: half of what there is to import.
_PUBLIC = {
    "collator": ("BlockDiagonalPackingCollator",),
    "dataset": ("Packed", "pack_dataset"),
    "distributed.deal_rows": ("BalanceReport", "Dealt", "check_dealing", "deal_rows"),
    "distributed.even_rows": ("even_rows",),
    "distributed.row_cost": ("RowCost",),
    "isolation.apply": ("IsolationReport", "check_isolation", "isolate"),
    "plan": ("PackPlan", "plan_packs"),
    "report": ("PackReport",),
    "stream": ("PackStream", "pack_stream"),
}
_INNER = {
    "arrow": ("TokenColumn",),
    "isolation.boundaries": ("Boundaries",),
    "isolation.forward": ("installed_backend", "set_aside"),
    "isolation.probe": ("Reference", "logits_of", "reference_of"),
    "report": ("LOSSES",),
}
__all__ = sorted(name for names in _PUBLIC.values() for name in names)
if not TYPE_CHECKING:  # which shall complain of any other name
    __getattr__, __dir__ = on_demand(__name__, _PUBLIC, _INNER)
