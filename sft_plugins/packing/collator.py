"""`BlockDiagonalPackingCollator`: any number of rows → one row, and where its documents begin and end.

Invariant: a batch says nothing but where documents end (no attention mask, which would switch isolation off), and the
first token of a document carries no loss, since all that stands before it is another document.

    rows   5 6 2 7 2 (seq_lengths 3, 2)   8 9 2 (3)
    input_ids     5 6 2 7 2 8 9 2         labels  −100 6 2 −100 2 −100 9 2
    position_ids  0 1 2 0 1 0 1 2         seq_idx    0 0 0    1 1    2 2 2      cu_seq_lens 0 3 5 8
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins._models import causal_lm_of
from sft_plugins.errors import PackingError
from sft_plugins.packing.isolation.apply import check_isolation, isolate
from sft_plugins.packing.isolation.boundaries import Boundaries
from sft_plugins.packing.isolation.forward import installed_backend

ROWS = ("packed", "documents")


class BlockDiagonalPackingCollator:
    """Flattens rows to one row in which no document sees another; serves training and evaluation.

    Constructing it isolates `model` and proves it (`isolate`; a model isolated before is only proved again), and keeps no
    reference to it: the collator is a few numbers, and travels to workers.

    Args:
        tokenizer: gives the id written into padding (its pad token, else EOS). Not changed, not kept.
        model: the causal LM that will be fed, bare or wrapped.
        rows: `packed` takes rows of several documents and demands `seq_lengths` on every one, so that rows whose column a
            host has pruned are not read as single documents; `documents` takes single documents and refuses `seq_lengths`.
        pad_to_multiple_of: fill the row up with a document of padding, without loss.

    Attributes:
        isolation: the `IsolationReport` of `model`.

    Returns from a call, for T tokens in N documents: `input_ids`, `labels`, `position_ids` int64 [1, T]; `cu_seq_lens_q`,
    `cu_seq_lens_k` int32 [N+1]; `max_length_q`, `max_length_k` int; `seq_idx` int32 [1, T].

    Raises:
        ContaminationError: from the constructor, if `model` cannot be isolated.
        PackingError: from the constructor, `bad_option`; from a call, with the position of the bad row in the batch:
            `bad_schema`, `length_mismatch`, `boundaries`, `id_out_of_range`, `bad_labels`, `no_supervised_tokens`.
    """

    def __init__(
        self, tokenizer: Any, *, model: nn.Module, rows: str = "packed", pad_to_multiple_of: int | None = None
    ) -> None:
        if rows not in ROWS:
            raise PackingError(f"rows is {rows!r}; expected one of {', '.join(map(repr, ROWS))}", code="bad_option")
        if pad_to_multiple_of is not None and (not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1):
            raise PackingError(
                f"pad_to_multiple_of is {pad_to_multiple_of!r}; expected a positive int or None", code="bad_option"
            )
        if not hasattr(tokenizer, "pad_token_id"):
            raise PackingError(
                f"expected a transformers tokenizer, got {type(tokenizer).__name__}",
                code="bad_option",
                remedy="pass `processor.tokenizer`"
                if hasattr(tokenizer, "tokenizer")
                else "AutoTokenizer.from_pretrained",
            )
        pads = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None]
        if pad_to_multiple_of is not None and not pads:
            raise PackingError(
                "pad_to_multiple_of needs an id for padding, and the tokenizer has neither a pad nor an EOS token",
                code="bad_option",
                remedy="leave pad_to_multiple_of out, or give the tokenizer a pad token",
            )
        lm = causal_lm_of(model)
        report = isolate(model) if installed_backend(lm) is None else check_isolation(model)
        self.isolation = dataclasses.replace(report, _undo=None)
        self.rows, self.pad_to_multiple_of = rows, pad_to_multiple_of
        self.pad_token_id = pads[0] if pads else None
        self.vocabulary_size = int(lm.get_input_embeddings().weight.shape[0])

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        read = [self._read(row, feature) for row, feature in enumerate(features)]
        if not read:
            raise PackingError("the batch has no rows", code="bad_schema")
        ids, labels, lengths = (np.concatenate(parts) for parts in zip(*read, strict=True))
        boundaries = Boundaries(lengths)
        labels[boundaries.starts] = IGNORE_INDEX
        self._check(ids, labels, [row[0].size for row in read])
        if self.pad_to_multiple_of is not None and (missing := -ids.size % self.pad_to_multiple_of):
            ids = np.append(ids, np.full(missing, self.pad_token_id))
            labels = np.append(labels, np.full(missing, IGNORE_INDEX))
            boundaries = Boundaries(np.append(lengths, missing))
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(labels)[None],
            **boundaries.batch("cpu"),
        }

    def _read(self, row: int, feature: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 (ids, labels, lengths) of one row."""
        if not isinstance(feature, Mapping):
            raise PackingError(
                f"expected a mapping of columns, got {type(feature).__name__}",
                code="bad_schema",
                row=row,
                remedy="pass rows one by one; rows of documents come from pack_dataset",
            )
        if missing := [name for name in ("input_ids", "labels") if feature.get(name) is None]:
            raise PackingError(
                f"the row has no {' and no '.join(missing)}; found {', '.join(map(str, feature)) or 'nothing'}",
                code="bad_schema",
                row=row,
                remedy="mask the dataset first, {mask_dataset:`mask_dataset(dataset, PromptMasker(tokenizer))`}",
            )
        ids, labels = (_integers(feature[name], name, row) for name in ("input_ids", "labels"))
        if ids.size != labels.size:
            raise PackingError(
                f"{ids.size} input_ids and {labels.size} labels; expected as many", code="length_mismatch", row=row
            )
        if (mask := feature.get("attention_mask")) is not None and _hides(mask):
            raise PackingError(
                "attention_mask hides tokens or numbers documents; expected none, or ones alone",
                code="bad_schema",
                row=row,
                remedy="cut the padding off; documents are told apart by seq_lengths",
            )
        return ids, labels.copy(), self._lengths(row, feature, ids.size)

    def _lengths(self, row: int, feature: Mapping[str, Any], size: int) -> np.ndarray:
        given = feature.get("seq_lengths")
        if self.rows == "documents":
            if given is not None:
                raise PackingError(
                    "the row is packed (it has `seq_lengths`), and rows='documents' reads it as one document",
                    code="bad_schema",
                    row=row,
                    remedy="rows='packed'",
                )
            lengths = np.array([size])
        elif given is None:
            raise PackingError(
                f"the row has no `seq_lengths`, so where its documents end is lost; found {', '.join(feature)}",
                code="bad_schema",
                row=row,
                remedy="remove_unused_columns=False keeps the column; rows='documents' takes single documents",
            )
        else:
            lengths = _integers(given, "seq_lengths", row)
        if lengths.size == 0 or lengths.min() < 1 or lengths.sum() != size:
            raise PackingError(
                f"documents of {lengths.tolist()[:8]} tokens do not fill a row of {size}; expected positive lengths "
                "that add up to it",
                code="boundaries",
                row=row,
            )
        return lengths

    def _check(self, ids: np.ndarray, labels: np.ndarray, sizes: list[int]) -> None:
        """Every id is one the model knows, every label is −100 or the id at its place, and something is learned."""
        ends = np.cumsum(sizes)
        wrong = (ids < 0) | (ids >= self.vocabulary_size)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise PackingError(
                f"token id {ids[at]} is none of the model's {self.vocabulary_size}",
                code="id_out_of_range",
                row=int(np.searchsorted(ends, at, side="right")),
                remedy="resize the model's embeddings, or use its own tokenizer",
            )
        wrong = (labels != IGNORE_INDEX) & (labels != ids)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise PackingError(
                f"label {labels[at]} stands at token id {ids[at]}; expected {IGNORE_INDEX} or that id",
                code="bad_labels",
                row=int(np.searchsorted(ends, at, side="right")),
                remedy="labels are not shifted here: the model's loss shifts them",
            )
        if (labels == IGNORE_INDEX).all():
            raise PackingError(
                f"none of the batch's {ids.size} tokens carries loss",
                code="no_supervised_tokens",
                remedy="drop such rows first: {unsupervised_dropped:mask_dataset and pack_dataset do, and count them}",
            )


def _hides(mask: Any) -> bool:
    """Whether an attention mask is more than ones: [T], or one per document as `extra_columns="carry"` keeps them."""
    parts = mask if len(mask) and np.ndim(mask[0]) else [mask]
    return not all(np.all(np.asarray(part) == 1) for part in parts)


def _integers(values: Any, name: str, row: int) -> np.ndarray:
    """int64 [n], a copy where the dtype differs."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise PackingError(
            f"{name} must be a flat list of integers, got {array.ndim}-D {array.dtype}", code="bad_schema", row=row
        )
    return array.astype(np.int64, copy=False)
