"""`StrictPromptMaskingCollator`: rows → one padded batch whose padding is known by position, never by token id.

rows   5 6 7 2 | 8 9 2          pad = eos = 2
input_ids       5 6 7 2         attention_mask  1 1 1 1      labels  −100 −100   7    2
                8 9 2 2                         1 1 1 0              −100   9    2  −100
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins._options import whole_number_or_none
from sft_plugins.errors import MaskingError
from sft_plugins.masking.checks import RowRules, check_batch
from sft_plugins.masking.examples.tokenized import label_arrays, refuse_packed
from sft_plugins.masking.masker import PromptMasker
from sft_plugins.masking.turns.tokenizer import require_tokenizer

logger = logging.getLogger(__name__)


class StrictPromptMaskingCollator:
    """Pads masked rows to the right and checks every batch.

    Args:
        tokenizer: gives the id written into padding (its pad token, else EOS, else 0) and the range of ids. Not changed.
        masker: masks raw rows on the fly; without it rows must be tokenised. What its options let drop is warned of, the first
            time for each code, and counted in `dropped`.
        pad_to_multiple_of: round the batch's width up to a multiple, for tensor cores.

    Takes rows with `input_ids` and `labels`, `completion_mask` or `assistant_masks`, as lists, NumPy arrays or tensors, and raw
    rows where there is a masker. A raw row that the masker splits becomes several rows of the batch.

    Attributes:
        dropped: raw rows, or parts of them, that the masker dropped in this process (workers count in theirs), by code.

    Returns from a call: `input_ids`, `labels`, `attention_mask`, each int64 `[B, T]`, and nothing else.

    Raises:
        MaskingError: `bad_option` and `bad_schema` here; from a call any code of `PromptMasker.encode`, with the position
            of the bad row in the batch as `row`, and `no_supervised_tokens` where the masker has dropped every row of it.
    """

    def __init__(
        self, tokenizer: Any, *, masker: PromptMasker | None = None, pad_to_multiple_of: int | None = None
    ) -> None:
        pad_to_multiple_of = whole_number_or_none("pad_to_multiple_of", pad_to_multiple_of, MaskingError)
        require_tokenizer(tokenizer)
        self.tokenizer, self.masker, self.pad_to_multiple_of = tokenizer, masker, pad_to_multiple_of
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token_id = next(token for token in ids if token is not None)
        self.dropped: Counter[str] = Counter()

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        arrays = [pair for row, feature in enumerate(features) for pair in self._arrays(row, feature)]
        if not arrays:
            raise MaskingError(
                f"nothing is left of a batch of {len(features)} rows.",
                code="no_supervised_tokens",
                remedy="Mask the dataset with mask_dataset first: it drops rows before they are dealt into batches.",
            )
        # Of the tokenizer as it is now: tokens may have been added since.
        check_batch(arrays, RowRules(vocabulary_size=len(self.tokenizer), bos_token_id=self.tokenizer.bos_token_id))
        lengths = np.array([len(ids) for ids, _ in arrays])
        width = int(lengths.max())
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        real = np.arange(width) < lengths[:, None]
        input_ids = np.full(real.shape, self.pad_token_id, np.int64)
        labels = np.full(real.shape, IGNORE_INDEX, np.int64)
        input_ids[real] = np.concatenate([ids for ids, _ in arrays])
        labels[real] = np.concatenate([labels for _, labels in arrays])
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
        }

    def _arrays(self, row: int, feature: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`(input_ids, labels)` of every row that `feature` becomes."""
        try:
            if not isinstance(feature, Mapping):
                raise MaskingError(
                    f"expected a mapping of columns, got {type(feature).__name__}.",
                    code="bad_schema",
                    remedy="Rows are dictionaries with `input_ids` and `labels`.",
                )
            refuse_packed(feature)
            if feature.get("input_ids") is not None:
                return [label_arrays(feature)]
            if self.masker is None:
                raise MaskingError(
                    f"the row has no `input_ids`; found columns {', '.join(map(repr, feature)) or 'none'}.",
                    code="bad_schema",
                    remedy="Pass masker=PromptMasker(tokenizer) for raw rows, and remove_unused_columns=False to the "
                    "trainer so that their columns arrive.",
                )
            (outcome,) = self.masker.encode_batch([feature])
            for error in outcome.errors:
                self._drop(error, row)
        except MaskingError as error:
            raise error.at_row(row) from error
        return [example.arrays for example in outcome.rows]

    def _drop(self, error: MaskingError, row: int) -> None:
        assert self.masker is not None
        if not self.masker.options.drops(error.code):
            raise error
        if not self.dropped[error.code]:
            logger.warning("a row of this batch is dropped, and more like it without a word: %s", error.at_row(row))
        self.dropped[error.code] += 1
