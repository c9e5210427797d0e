"""What a training run is going to do, whichever trainer's configuration says it: the one thing preflight checks.

    CONFIG.yaml ── a reader per host (`sft_plugins.integrations.config_file`) ──► Plan ── run_preflight ──► Verdict

Invariant: a `Plan` holds what the configuration says, with the host's defaults filled in; it guesses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sft_plugins.preflight.data.source import Source
from sft_plugins.preflight.findings import Finding

Packer = Literal["sft_plugins", "host"]
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DataEntry:
    """One source of rows.

    Attributes:
        where: its name in the configuration, `datasets[0]`.
        path: a file or folder. split: of a dataset with several, or a part of a file (`train[:500]`).
        select: of so many rows, the numbers of those that the run uses; None for all.
        evaluation: whether it is evaluated on, not trained on.
        exact: whether `PromptMasker` masks it; otherwise the host does.
        trains: what the host puts loss on where it masks: `answers`, or `everything`.
        rename: gives a row the field names that `PromptMasker` knows.
        chat_template: in place of the tokenizer's. template_unknown: the host has one that is not to be had here.
        masking: further options of `PromptMasker`.
        drops: whether rows that cannot be masked exactly are left out, and not an error.
        text_field: column of finished text, where the host trains on text as it stands.
        renders: whether the host writes the rows by a chat template, so that they can be judged; otherwise it writes them in
            words of its own, and only whether they can be read is known.
    """

    where: str
    path: str
    split: str | None = None
    select: Callable[[int], Iterable[int]] | None = None
    evaluation: bool = False
    exact: bool
    trains: Literal["answers", "everything"] = "answers"
    rename: Callable[[Row], dict[str, Any]] | None = None
    chat_template: str | None = None
    template_unknown: bool = False
    renders: bool = True
    masking: Mapping[str, Any] = field(default_factory=dict)
    drops: bool = False
    text_field: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run.

    Attributes:
        host: `"TRL"` or `"Axolotl"`. path: the configuration.
        model, tokenizer: folder or hub id of each.
        max_length: tokens of a row, None for no limit.
        packer: who packs rows, None for nobody. isolated: whether `isolate` acts on the model.
        packs_evaluation: whether evaluation rows are packed too.
        batch_size, accumulation, devices: rows per step are their product.
        max_steps: where training ends at the latest, whatever the epochs say.
        findings: what the configuration shows by itself.
        look: what else this host would do to the rows of an entry that it masks itself.
        prepare: what this host does to a tokenizer before it masks, and the ids that it ends answers with (None: the
            tokenizer's own).
        trained_rows: of so many masked rows, how many are trained; the others are held out, or another node's.
        count_steps: optimizer steps that this host makes of so many rows.
    """

    host: str
    path: str
    model: str
    tokenizer: str
    attn_implementation: str | None
    entries: tuple[DataEntry, ...]
    max_length: int | None
    packer: Packer | None
    isolated: bool
    packs_evaluation: bool
    batch_size: int
    accumulation: int
    epochs: float
    devices: int
    max_steps: int | None = None
    findings: tuple[Finding, ...] = ()
    look: Callable[[DataEntry, Source, Any], Iterable[Finding]] = lambda _entry, _source, _tokenizer: ()
    prepare: Callable[[Any], tuple[Any, list[int] | None]] = lambda tokenizer: (tokenizer, None)
    trained_rows: Callable[[int], int] = lambda rows: rows
    count_steps: Callable[[Plan, int], int] | None = None

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.devices

    def steps(self, rows: int) -> int:
        """Optimizer steps of the whole run over so many rows; as `transformers.Trainer` counts unless the host says otherwise.

        10 rows, batches of 2 on 2 devices, 2 accumulated, 1.5 epochs: 3 batches, 2 steps an epoch, 3 steps
        """
        if self.count_steps is not None:
            return self.count_steps(self, rows)
        batches = math.ceil(rows / (self.batch_size * self.devices))
        steps = math.ceil(self.epochs * math.ceil(batches / self.accumulation))
        return steps if self.max_steps is None else self.max_steps
