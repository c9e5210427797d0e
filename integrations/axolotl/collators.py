"""Our collators as Axolotl builds them: `cls(tokenizer, padding=True, [pad_to_multiple_of=N], **ours, return_tensors="pt")`.

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

from sft_plugins.errors import SFTPluginsError
from sft_plugins.integrations.axolotl.remedies import remedies_in_yaml
from sft_plugins.masking import StrictPromptMaskingCollator
from sft_plugins.packing import BlockDiagonalPackingCollator


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
        with remedies_in_yaml():
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
