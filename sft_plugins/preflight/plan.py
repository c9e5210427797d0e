"""What a training run is going to do, whichever trainer's configuration says it: the one thing preflight checks.

    CONFIG.yaml ── a reader per host (`sft_plugins.integrations.config_file`) ──► Plan ── run_preflight ──► Verdict

Invariant: a `Plan` holds what the configuration says, with the host's defaults filled in; it guesses nothing.
"""

from __future__ import annotations

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
        path: a file or folder. split: of a dataset with several.
        evaluation: whether it is evaluated on, not trained on.
        exact: whether `PromptMasker` masks it; otherwise the host does.
        trains: what the host puts loss on where it masks: `answers`, or `everything`.
        rename: gives a row the field names that `PromptMasker` knows.
        chat_template: in place of the tokenizer's.
        masking: further options of `PromptMasker`.
        drops: whether rows that cannot be masked exactly are left out, and not an error.
        text_field: column of finished text, where the host trains on text as it stands.
    """

    where: str
    path: str
    split: str | None = None
    evaluation: bool = False
    exact: bool
    trains: Literal["answers", "everything"] = "answers"
    rename: Callable[[Row], dict[str, Any]] | None = None
    chat_template: str | None = None
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
        findings: what the configuration shows by itself.
        look: what else this host would do to the rows of an entry that it masks itself.
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
    findings: tuple[Finding, ...] = ()
    look: Callable[[DataEntry, Source, Any], Iterable[Finding]] = lambda _entry, _source, _tokenizer: ()
