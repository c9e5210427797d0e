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
from sft_plugins._options import one_of, whole_number_or_none
from sft_plugins._rows import (
    TREE_COLUMNS,
    RowRules,
    already_packed,
    first_fault,
    integers,
    length_mismatch,
    read_segments,
)
from sft_plugins.errors import PackingError
from sft_plugins.packing.isolation.apply import check_isolation, isolate
from sft_plugins.packing.isolation.boundaries import Boundaries
from sft_plugins.packing.isolation.forward import installed_backend
from sft_plugins.packing.isolation.trees import Trees

ROWS = ("packed", "documents")


class BlockDiagonalPackingCollator:
    """Flattens rows to one row in which no document sees another; serves training and evaluation.

    Constructing it isolates `model` and proves it (`isolate`; a model isolated before is only proved again), and keeps no
    reference to it: the collator is a few numbers, and travels to workers. Rows of trees (`share_prefixes`) are proved with
    it, and refused where they are not exact: `isolation.prefix_trees`.

    Args:
        tokenizer: gives the id written into padding (its pad token, else EOS). Not changed, not kept.
        model: the causal LM that will be fed, bare or wrapped.
        rows: `packed` takes rows of several documents and demands `seq_lengths` on every one, so that rows whose column a
            host has pruned are not read as single documents; `documents` takes single documents and refuses `seq_lengths`.
        pad_to_multiple_of: fill the row up with a document of padding, without loss.

    Attributes:
        isolation: the `IsolationReport` of `model`.

    Returns from a call, for T tokens in N documents: `input_ids`, `labels`, `position_ids` int64 [1, T]; `cu_seq_lens_q`,
    `cu_seq_lens_k` int32 [N+1]; `max_length_q`, `max_length_k` int; `seq_idx` int32 [1, T]; of trees also `seq_depths` and
    `seq_parents` int32 [N].

    Raises:
        ContaminationError: from the constructor, if `model` cannot be isolated.
        PackingError: from the constructor, `bad_option`; from a call, with the position of the bad row in the batch:
            `bad_schema`, `length_mismatch`, `boundaries`, `already_packed`, `prefix_trees`, `id_out_of_range`,
            `label_mismatch`, `no_supervised_tokens`.
    """

    def __init__(
        self, tokenizer: Any, *, model: nn.Module, rows: str = "packed", pad_to_multiple_of: int | None = None
    ) -> None:
        one_of("rows", rows, ROWS, PackingError)
        pad_to_multiple_of = whole_number_or_none("pad_to_multiple_of", pad_to_multiple_of, PackingError)
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
        prove = isolate if installed_backend(lm) is None else check_isolation
        report = prove(model, share_prefixes=True)
        self.isolation = dataclasses.replace(report, _undo=None)
        self.rows, self.pad_to_multiple_of = rows, pad_to_multiple_of
        self.pad_token_id = pads[0] if pads else None
        self.vocabulary_size = int(lm.get_input_embeddings().weight.shape[0])

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        read = []
        for row, feature in enumerate(features):
            try:
                read.append(self._read(feature))
            except PackingError as error:
                raise error.at_row(row) from error
        if not read:
            raise PackingError("the batch has no rows", code="bad_schema")
        ids, labels, lengths, depths, parents = (np.concatenate(parts) for parts in zip(*read, strict=True))
        documents = [row[2].size for row in read]
        parents += np.where(parents < 0, 0, np.repeat(np.cumsum(documents) - documents, documents))
        labels[np.cumsum(lengths) - lengths] = IGNORE_INDEX
        self._check(ids, labels, [row[0].size for row in read])
        if self.pad_to_multiple_of is not None and (missing := -ids.size % self.pad_to_multiple_of):
            ids = np.append(ids, np.full(missing, self.pad_token_id))
            labels = np.append(labels, np.full(missing, IGNORE_INDEX))
            lengths, depths, parents = np.append(lengths, missing), np.append(depths, 0), np.append(parents, -1)
        boundaries = Boundaries(lengths)
        if (parents >= 0).any():
            boundaries = Trees(lengths=lengths, depths=depths, parents=parents)
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(labels)[None],
            **boundaries.batch("cpu"),
        }

    def _read(self, feature: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        """int64 (ids, labels, lengths, depths, parents) of one row."""
        if not isinstance(feature, Mapping):
            raise PackingError(
                f"expected a mapping of columns, got {type(feature).__name__}",
                code="bad_schema",
                remedy="pass rows one by one; rows of documents come from pack_dataset",
            )
        if missing := [name for name in ("input_ids", "labels") if feature.get(name) is None]:
            raise PackingError(
                f"the row has no {' and no '.join(missing)}; found {', '.join(map(str, feature)) or 'nothing'}",
                code="bad_schema",
                remedy="mask the dataset first, {mask_dataset:`mask_dataset(dataset, PromptMasker(tokenizer))`}",
            )
        ids, labels = (integers(feature[name], name, PackingError).astype(np.int64) for name in ("input_ids", "labels"))
        if ids.size != labels.size:
            raise length_mismatch("labels", labels.size, ids.size, PackingError)
        if (mask := feature.get("attention_mask")) is not None and _hides(mask):
            raise PackingError(
                "attention_mask hides tokens or numbers documents; expected none, or ones alone",
                code="bad_schema",
                remedy="cut the padding off; documents are told apart by seq_lengths",
            )
        if self.rows == "documents":
            if packed := already_packed(feature, PackingError):
                raise packed
            return ids, labels, *read_segments({"seq_lengths": [ids.size]}, ids, PackingError)
        if all(feature.get(name) is None for name in ("seq_lengths", *TREE_COLUMNS)):
            raise PackingError(
                f"the row has no `seq_lengths`, so where its documents end is lost; found {', '.join(feature)}",
                code="bad_schema",
                remedy="remove_unused_columns=False keeps the column; rows='documents' takes single documents",
            )
        segments = read_segments(feature, ids, PackingError)
        if segments.branched and not self.isolation.prefix_trees:
            raise PackingError(
                "the row holds trees (`seq_parents`), and the model was not proved to keep their branches apart",
                code="prefix_trees",
                remedy="{no_trees:pack with share_prefixes=False}; the report of isolation notes what stands against trees",
            )
        return ids, labels, *segments

    def _check(self, ids: np.ndarray, labels: np.ndarray, sizes: list[int]) -> None:
        """Every id is one the model knows, every label is −100 or the id at its place, and something is learned."""
        rules = RowRules(vocabulary_size=self.vocabulary_size, supervised=False)
        if fault := first_fault(ids, labels, np.array(sizes), rules, PackingError):
            raise fault
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
