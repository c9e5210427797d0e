"""Packed rows, and our collators as Axolotl builds them:

    cls(tokenizer, padding=True, [pad_to_multiple_of=N], **ours, return_tensors="pt")

| rows | batch |
| --- | --- |
| `padded` | masked rows, one document each, padded |
| `packed` | our packed rows, flattened |
| `documents` | single documents, as flat rows or as Axolotl's multipack nests them (`[[a, b], [c]]`), flattened |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import PackingError, SFTPluginsError
from sft_plugins.integrations.axolotl.log import LOG, in_yaml
from sft_plugins.integrations.axolotl.settings import PackingSettings
from sft_plugins.masking import StrictPromptMaskingCollator
from sft_plugins.packing import BlockDiagonalPackingCollator, deal_rows, even_rows, pack_dataset


def padded(
    tokenizer: Any, *, padding: Any = True, pad_to_multiple_of: int | None = None, return_tensors: str = "pt"
) -> StrictPromptMaskingCollator:
    """Rows of one document each."""
    _as_axolotl_asks(padding, return_tensors)
    return StrictPromptMaskingCollator(tokenizer, pad_to_multiple_of=pad_to_multiple_of)


def packed(
    tokenizer: Any,
    *,
    model: nn.Module,
    padding: Any = True,
    pad_to_multiple_of: int | None = None,
    return_tensors: str = "pt",
) -> BlockDiagonalPackingCollator:
    """Rows of several documents, made by `pack_dataset`."""
    _as_axolotl_asks(padding, return_tensors)
    return BlockDiagonalPackingCollator(tokenizer, model=model, pad_to_multiple_of=pad_to_multiple_of)


def documents(
    tokenizer: Any,
    *,
    model: nn.Module,
    padding: Any = True,
    pad_to_multiple_of: int | None = None,
    return_tensors: str = "pt",
) -> DocumentsCollator:
    """Single documents, flat or nested."""
    _as_axolotl_asks(padding, return_tensors)
    return DocumentsCollator(
        BlockDiagonalPackingCollator(tokenizer, model=model, rows="documents", pad_to_multiple_of=pad_to_multiple_of)
    )


class DocumentsCollator:
    """`[[a, b], [c]]` or `[a, b, c]` → one row of the documents a, b, c, told apart."""

    def __init__(self, collator: BlockDiagonalPackingCollator) -> None:
        self.collator = collator

    def __call__(self, features: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        rows = chain.from_iterable([row] if isinstance(row, Mapping) else row for row in features)
        with in_yaml():
            return self.collator(list(rows))


OURS = (StrictPromptMaskingCollator, BlockDiagonalPackingCollator, DocumentsCollator)


def _as_axolotl_asks(padding: Any, return_tensors: str) -> None:
    """Refuse what these collators would otherwise have to ignore."""
    if padding not in (True, "longest") or return_tensors != "pt":
        raise SFTPluginsError(
            f"Axolotl asked for a collator with padding={padding!r}, return_tensors={return_tensors!r}; "
            "expected True and 'pt'.",
            code="host_collator",
            remedy="Use a supported version of Axolotl.",
        )


def pack(rows: Any, max_length: int, settings: PackingSettings, *, strict: bool, name: str) -> Any:
    if not strict:
        # Rows of other strategies may supervise the first token, which nothing predicts even in a row of its own.
        rows = rows.map(_first_label_off, desc="First labels")
    with in_yaml():
        packed, report = pack_dataset(
            rows,
            max_length,
            unsupervised=settings.unsupervised,
            extra_columns="drop",
            seed=settings.seed,
            share_prefixes=settings.share_prefixes,
        )
    LOG.info(
        f"sft-plugins packed the {name} rows: {report.documents:,} documents in {report.rows:,} rows, "
        f"{report.fill:.1%} full\n{report}"
    )
    return packed


def evened(packed: Any, rows_per_step: int) -> Any:
    """As many rows as optimizer steps take: else documents are trained twice on several ranks, and Axolotl cuts the last
    epoch short."""
    try:
        even = even_rows(packed, rows_per_step)
    except PackingError as error:  # hardly more documents than rows: nothing to take apart
        LOG.warning(
            f"sft-plugins: {len(packed):,} packed rows are no multiple of the {rows_per_step:,} rows of an optimizer step, "
            f"and cannot be made so ({error.message}): on several ranks some documents are trained twice per epoch"
        )
        return packed
    if even is not packed:
        LOG.info(
            f"sft-plugins took packed rows apart between documents: {len(even):,} rows, {rows_per_step:,} to a step"
        )
    return even


def deal(packed: Any, cfg: Any, settings: PackingSettings) -> Any:
    accumulation, batch_size = cfg.gradient_accumulation_steps, cfg.micro_batch_size
    ranks = cfg.batch_size // (accumulation * batch_size)
    with in_yaml():
        dealt = deal_rows(packed, ranks=ranks, accumulation=accumulation, batch_size=batch_size, seed=settings.seed)
    LOG.info(f"sft-plugins dealt the train rows (attention counted alone): {dealt.report}")
    return dealt


def _first_label_off(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": [IGNORE_INDEX, *row["labels"][1:]]}
