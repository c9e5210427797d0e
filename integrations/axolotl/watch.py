"""`ModeCollapseCallback` as `sft_plugins.collapse` of the YAML asks for it."""

from __future__ import annotations

from typing import Any

from sft_plugins.collapse import ModeCollapseCallback
from sft_plugins.integrations.axolotl.remedies import remedies_in_yaml
from sft_plugins.integrations.axolotl.settings import CollapseSettings


class AxolotlCollapseCallback(ModeCollapseCallback):
    """The same callback; what it refuses when training begins is told in the words of the YAML."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        with remedies_in_yaml():
            super().on_train_begin(*args, **kwargs)


def collapse_callback(settings: CollapseSettings, tokenizer: Any, heldout: Any) -> ModeCollapseCallback:
    """The callback, not yet attached; `heldout` are the evaluation rows before they were packed, or None."""
    rows = heldout.select_columns(["input_ids", "labels"]) if heldout is not None and settings.heldout else None
    return AxolotlCollapseCallback(
        tokenizer,
        None if settings.prompts == "builtin" else settings.prompts,
        eval_pairs=rows,
        every_steps=settings.every_steps,
        samples_per_prompt=settings.samples_per_prompt,
        max_new_tokens=settings.max_new_tokens,
        baseline=None if settings.baseline == "off" else settings.baseline,
        embedder=None if settings.embedder == "off" else settings.embedder,
        on_collapse=settings.on_collapse,
        output_dir=settings.output_dir,
        seed=settings.seed,
        budget=None if settings.budget == "off" else settings.budget,
        max_eval_pairs=settings.max_eval_pairs,
        detector=settings.detector_config(),
        report=settings.report,
    )
