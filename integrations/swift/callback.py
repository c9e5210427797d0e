"""`--callbacks sft_plugins`: what happens when in a run of ms-swift.

register()          the file of --external_plugins is read: rows pass the template, the callback has its name
the trainer built   packed rows: the model is isolated and proved, our collator takes the place of ms-swift's;
                    where asked, the collapse watch joins
training begins     the rows are whole, of this tokenizer, and the first batches hold them: ids, labels, order
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swift.callbacks import TrainerCallback, callbacks_map
from swift.utils import get_logger

from sft_plugins._options import bad_option
from sft_plugins.collapse import ModeCollapseCallback
from sft_plugins.errors import CollapseError, PackingError
from sft_plugins.integrations._compat import require
from sft_plugins.integrations.swift.arrival import check_batches, check_rows, is_packed, rows_of
from sft_plugins.integrations.swift.rows import look_at, pass_rows_through
from sft_plugins.packing import BlockDiagonalPackingCollator

NAME = "sft_plugins"
LOG = get_logger()


def register(*, watch: bool | Mapping[str, Any] = False) -> None:
    """Let ms-swift read masked rows, and know the callback `sft_plugins`.

    Args:
        watch: whether `ModeCollapseCallback` joins the run; a mapping gives its options, `prompts` among them.

    Raises:
        SFTPluginsError: `unsupported_version`.
        CollapseError: `bad_option` for a `watch` that is neither.
    """
    require("torch", "transformers", "peft", "ms-swift")
    if not isinstance(watch, bool | Mapping):
        raise bad_option(
            "watch", watch, "True, False or a mapping of ModeCollapseCallback's options", CollapseError,
            remedy='write register(watch={"prompts": "prompts.jsonl"})',
        )  # fmt: skip
    pass_rows_through()
    callbacks_map[NAME] = lambda args, trainer: SwiftCallback(args, trainer, watch=watch)


class SwiftCallback(TrainerCallback):
    """Made by ms-swift while it builds its trainer."""

    def __init__(self, args: Any, trainer: Any, *, watch: bool | Mapping[str, Any]) -> None:
        super().__init__(args, trainer)
        self._watch = watch
        look_at(trainer.template)

    def on_init_end(self, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        if is_packed(rows_of(trainer.train_dataset)):
            self._isolate(trainer)
        if self._watch is not False:
            options = dict(self._watch) if isinstance(self._watch, Mapping) else {}
            ModeCollapseCallback(trainer.template.tokenizer, **options).attach(trainer)

    def _isolate(self, trainer: Any) -> None:
        evaluation = rows_of(trainer.eval_dataset) if trainer.eval_dataset else None
        if evaluation is not None and not is_packed(evaluation):
            raise PackingError(
                "the training rows are packed and the evaluation rows are not; one collator serves both.",
                code="bad_schema",
                remedy="Write the evaluation rows with `sft-plugins mask --to swift --pack` too.",
            )
        collator = BlockDiagonalPackingCollator(trainer.template.tokenizer, model=trainer.model)
        trainer.data_collator = collator
        LOG.info(f"sft-plugins isolation proved: {collator.isolation}")

    def on_train_begin(self, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
        rows = check_rows(self.trainer)
        compared = check_batches(train_dataloader, rows)
        LOG.info(f"sft-plugins: {len(rows):,} masked rows; the first {compared} in the data loader are those on disk.")
