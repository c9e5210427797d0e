"""TRL's `SFTTrainer`: the arguments with which it leaves masked rows alone, and a check that a built trainer did.

Three ways to exact masking, the first recommended:

    rows = mask_dataset(dataset, masker).dataset      SFTTrainer(args=SFTConfig(**sft_arguments("masked")), train_dataset=rows,
                                                                 data_collator=StrictPromptMaskingCollator(tokenizer))
    raw rows, masked as they are drawn                … sft_arguments("raw") …, data_collator=…(tokenizer, masker=masker)
    rows that TRL labels itself, audited              check_masks(trainer.train_dataset, tokenizer)

Packed rows (`pack_dataset`) take `sft_arguments("packed")` and `BlockDiagonalPackingCollator`. Unsloth makes TRL's trainer
anew: masked rows, and no collator, since any would switch its padding-free batches off (docs/unsloth.md).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import datasets
import numpy as np
import torch

from sft_plugins._models import causal_lm_of
from sft_plugins._options import one_of
from sft_plugins.errors import ContaminationError, MaskingError, SFTPluginsError
from sft_plugins.integrations._arrival import difference
from sft_plugins.integrations._compat import require
from sft_plugins.masking import StrictPromptMaskingCollator, label_arrays
from sft_plugins.packing import BlockDiagonalPackingCollator, TokenColumn, installed_backend

Rows = Literal["masked", "packed", "raw"]
_OURS = (StrictPromptMaskingCollator, BlockDiagonalPackingCollator)
_COLLATED = 8
_UNSLOTH = ("unsloth", "UnslothSFTTrainer")
"""Modules of Unsloth's trainers: its own, and the one that it writes in place of TRL's `SFTTrainer`."""
_STREAMS = (datasets.IterableDataset, torch.utils.data.IterableDataset)


@dataclass(frozen=True)
class TrainerCheck:
    """What `check_trainer` saw: class names of the live collators, and how many rows it compared.

    `prefix_trees`: whether the training rows hold trees, which the collator has proved on the model; None of a stream.
    """

    train_collator: str
    eval_collator: str | None
    rows: int | None
    rows_compared: int
    prefix_trees: bool | None = False


def sft_arguments(rows: Rows) -> dict[str, Any]:
    """Keyword arguments for `SFTConfig` under which TRL neither cuts, re-labels, packs nor filters our rows.

    Args:
        rows: `"masked"` (from `mask_dataset`), `"packed"` (from `pack_dataset`) or `"raw"` (masked by the collator).

    Raises:
        MaskingError: `bad_option`.
    """
    one_of("rows", rows, get_args(Rows), MaskingError)
    require("trl")
    arguments: dict[str, Any] = {
        "max_length": None,  # rows have their length already; TRL would cut them and drop what lost its answer
        "packing": False,  # TRL's own packing and padding-free batches refuse a collator of ours
        "padding_free": False,
        "assistant_only_loss": False,
        "completion_only_loss": None,
    }
    if rows == "packed":
        arguments["remove_unused_columns"] = False  # TRL keeps `seq_lengths`, but not what says where branches begin
    if rows == "raw":
        arguments |= {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return arguments


def check_trainer(trainer: Any, *, dataset: Any = None, rows_compared: int = 64) -> TrainerCheck:
    """Show that a built trainer really uses our collator, on the model it was built for, and kept our labels.

    Call it before `trainer.train()`. The first rows of each data set are collated as the trainer will do it. A trainer of
    Unsloth's collates by itself: there the first rows must come out of its collator as they are.

    Args:
        trainer: an `SFTTrainer`, or any `transformers.Trainer`.
        dataset: the masked or packed data set that was handed in; its first `rows_compared` rows are compared with those
            that the trainer will draw from.

    Raises:
        MaskingError: `host_collator` where the live dataloader's collator is not ours, `host_dataset` where rows were
            dropped, cut, re-labelled, lost a column or cannot be collated, `bad_option` for a stream as `dataset`.
        ContaminationError: `not_isolated` where rows are packed and the trainer's own model is not isolated; `prefix_trees`
            where they hold trees that were not proved on the model; other codes for models that cannot be packed.
    """
    trees = _proved_trees(trainer)
    live = _unsloth_collator if is_unsloth(trainer) else _live_collator
    train = live(trainer.get_train_dataloader(), "training")
    if isinstance(train, BlockDiagonalPackingCollator):
        _require_isolated(trainer)
    evaluation = None
    if trainer.eval_dataset is not None:
        names = [None] if not isinstance(trainer.eval_dataset, dict) else list(trainer.eval_dataset)
        for name in names:
            evaluation = live(trainer.get_eval_dataloader(name), "evaluation")
    compared = rows = None
    if dataset is not None:
        rows, compared = _compare_rows(dataset, trainer.train_dataset, rows_compared)
    return TrainerCheck(
        train_collator=type(train).__name__,
        eval_collator=None if evaluation is None else type(evaluation).__name__,
        rows=rows,
        rows_compared=compared or 0,
        prefix_trees=trees,
    )


def _proved_trees(trainer: Any) -> bool | None:
    """Whether the training rows hold trees, all of them looked at; those are proved on the collator's model."""
    rows = trainer.train_dataset
    if not isinstance(rows, datasets.Dataset):
        return None
    if "seq_parents" not in rows.column_names:
        return False
    parents = TokenColumn.of(rows, "seq_parents")
    branches = parents.count_unlike(-1, parents.length)
    collator = _innermost(trainer.data_collator)
    if branches.any() and isinstance(collator, BlockDiagonalPackingCollator) and not collator.isolation.prefix_trees:
        against = next((note for note in collator.isolation.notes if note.startswith("no trees")), "it was not asked")
        raise ContaminationError(
            f"{int((branches > 0).sum()):,} of {len(branches):,} rows hold trees, and the model was not proved to keep their "
            f"branches apart: {against}",
            code="prefix_trees",
            row=int(np.argmax(branches > 0)),
            remedy="Pack with share_prefixes=False.",
        )
    return bool(branches.any())


def is_unsloth(trainer: Any) -> bool:
    """Whether a class of `trainer` stands in a module of Unsloth's."""
    return any(cls.__module__.partition(".")[0] in _UNSLOTH for cls in type(trainer).__mro__)


def _unsloth_collator(dataloader: Any, phase: str) -> Any:
    """Unsloth's own collator, which gives back the first rows as they are."""
    collator = _innermost(dataloader.collate_fn)
    if isinstance(collator, _OURS):
        raise MaskingError(
            f"the {phase} dataloader collates with {type(collator).__name__}, "
            "which switches Unsloth's padding-free batches off.",
            code="host_collator",
            remedy="Leave `data_collator` out: rows with labels are trained as they are (docs/unsloth.md).",
        )
    rows = dataloader.dataset
    first = [] if isinstance(rows, _STREAMS) else [rows[i] for i in range(min(_COLLATED, len(rows)))]
    unlabelled = first and not {"input_ids", "labels"} <= set(first[0])
    found = (
        "the rows have no labels" if unlabelled else difference(dataloader.collate_fn(first), first) if first else None
    )
    if found is not None:
        raise MaskingError(
            f"the {phase} rows differ between the data set and the batch: {found}.",
            code="host_dataset",
            row=0,
            remedy="Train rows of `sft-plugins mask --to unsloth`, with `max_length=None` and `packing=False`.",
        )
    return collator


def _innermost(collator: Any) -> Any:
    """The collator at the bottom of what a Trainer wraps around it to remove columns."""
    while hasattr(collator, "data_collator"):
        collator = collator.data_collator
    return collator


def _live_collator(dataloader: Any, phase: str) -> Any:
    """One of our collators, and it takes the rows."""
    collator = _innermost(dataloader.collate_fn)
    if not isinstance(collator, _OURS):
        raise MaskingError(
            f"the {phase} dataloader collates with {type(collator).__name__}.",
            code="host_collator",
            remedy="Pass data_collator=StrictPromptMaskingCollator(tokenizer) (or BlockDiagonalPackingCollator) to the "
            "trainer, and build its arguments with sft_arguments(…).",
        )
    rows = dataloader.dataset
    if not isinstance(rows, _STREAMS):
        counted = copy.copy(getattr(collator, "dropped", None))
        try:
            # Not through the dataloader's own iterator, which would move the state of the random numbers.
            dataloader.collate_fn([rows[i] for i in range(min(_COLLATED, len(rows)))])
        except SFTPluginsError as error:
            raise MaskingError(
                f"the {phase} rows cannot be collated: {error}",
                code="host_dataset",
                row=error.row,
                remedy="Mask (and pack) them first: TRL labels rows that are not.",
            ) from error
        if counted is not None:
            collator.dropped = counted  # training will draw these rows again, and count them
    return collator


def _require_isolated(trainer: Any) -> None:
    if installed_backend(causal_lm_of(trainer.model)) is None:
        raise ContaminationError(
            "rows are packed, and the trainer's model is not isolated: the collator was built with another one, so "
            "documents would see one another.",
            code="not_isolated",
            remedy="Call isolate(model) in `model_init`, which makes the model anew when training begins."
            if getattr(trainer, "model_init", None) is not None
            else "Call isolate(trainer.model), or build the collator with the model that the trainer is given.",
        )


def _compare_rows(given: Any, held: Any, limit: int) -> tuple[int, int]:
    if isinstance(given, _STREAMS) or isinstance(held, _STREAMS):
        raise MaskingError(
            "the rows of a stream cannot be compared without drawing them.",
            code="bad_option",
            remedy="Leave `dataset` out.",
        )
    if len(given) != len(held):
        raise MaskingError(
            f"{len(given)} rows were handed in, the trainer holds {len(held)}.",
            code="host_dataset",
            remedy='Build the arguments with sft_arguments("masked"): max_length would filter rows.',
        )
    compared = min(limit, len(given))
    for row in range(compared):
        _compare_row(given[row], held[row], row)
    return len(given), compared


def _compare_row(given: Mapping[str, Any], held: Mapping[str, Any], row: int) -> None:
    missing = sorted(set(given) - set(held))
    if missing:
        raise MaskingError(
            f"the trainer's rows lost the columns {', '.join(missing)}.",
            code="host_dataset",
            row=row,
            remedy="Build the arguments with sft_arguments(…).",
        )
    if "input_ids" not in given:
        return
    for name, ours, theirs in zip(("input_ids", "labels"), label_arrays(given), label_arrays(held), strict=True):
        if not np.array_equal(ours, theirs):
            raise MaskingError(
                f"`{name}` has {len(theirs)} entries in the trainer and {len(ours)} as handed in, or others.",
                code="host_dataset",
                row=row,
                remedy="Build the arguments with sft_arguments(…): TRL cuts rows at max_length.",
            )
