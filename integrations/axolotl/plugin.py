"""`SFTPlugin`: what runs at which of Axolotl's hooks.

    register, validation    a new run; which command it is; versions; `sft_plugins:` is judged (validation.py)
    load_datasets           rows audited, then packed by us (`axolotl train` and `preprocess`; `evaluate` does not call it)
    post_model_load         the model isolated, and the proof logged
    get_training_args       the column that says where documents end is kept, and the order of rows that were dealt
    get_collator_…          our collators (collators.py)
    add_callbacks_post_…    rows audited that are not packed by us; the collapse callback, with the trainer handed to it
    post_trainer_create     the live collator is ours, and rows are drawn as they were dealt (`evaluate` does not call it)

Invariant: without our key in the validated configuration every hook does nothing. Axolotl keeps plug-ins of earlier runs
in one process and calls them again (0.21 the very instances), so all that an instance knows belongs to one run.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import HfArgumentParser

from sft_plugins.collapse import ModeCollapseCallback
from sft_plugins.errors import ContaminationError, MaskingError
from sft_plugins.integrations._compat import require
from sft_plugins.integrations.axolotl import collators
from sft_plugins.integrations.axolotl.log import LOG, Command, active, audit_rows, idle, in_yaml, warnings
from sft_plugins.integrations.axolotl.settings import (
    KEY,
    CollapseSettings,
    Settings,
    dataset_entries,
    is_ours,
    listed,
    packer,
    stop_token_ids,
)
from sft_plugins.packing import BalanceReport, check_dealing, isolate


class SFTPlugin(BasePlugin):
    """Exact masking, contamination-free packing and the collapse alarm for `axolotl train`."""

    def __init__(self) -> None:
        super().__init__()
        require("torch", "transformers", "peft", "axolotl")
        self._forget()

    def _forget(self) -> None:
        self._announced = self._audited = self._packed = False
        self._command: Command = "evaluate"  # until a hook is called that it does not call
        self._model: weakref.ref[Any] | None = None
        self._heldout: Any = None
        self._dealt: BalanceReport | None = None

    def register(self, cfg: Any) -> None:
        """A run begins. The raw configuration: only here do Axolotl's commands say that nothing will be trained."""
        self._forget()
        if listed(cfg) and (cfg.get("inference") or cfg.get("merge_lora")):
            self._command = "inference" if cfg.get("inference") else "merge-lora"
            LOG.info(idle(self._command))
            for line in warnings(self._command, cfg):
                LOG.warning(line)

    def get_input_args(self) -> str:
        """Where the model of our part of the configuration is."""
        return f"{KEY}.integrations.axolotl.validation.SFTPluginsArgs"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Our packed rows with their number of steps, or None where Axolotl's own rows serve."""
        self._command = "preprocess" if preprocess else "train"
        settings = self._settings(cfg)
        if settings is None:
            return None
        ours = settings.packing is not None and packer(settings, cfg) == "sft_plugins"
        if not ours and not (preprocess and settings.masking is not None):
            return None
        from axolotl.cli.args import PreprocessCliArgs, TrainerCliArgs
        from axolotl.common.datasets import load_datasets
        from axolotl.loaders import load_tokenizer

        # As Axolotl's own command does, so that its `--debug` options print what they always print.
        parser = HfArgumentParser(PreprocessCliArgs if preprocess else TrainerCliArgs)
        arguments, _ = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        meta = load_datasets(cfg=cfg, cli_args=arguments)
        self._audit(cfg, settings, meta.train_dataset, meta.eval_dataset, load_tokenizer(cfg))
        # What is prepared is kept as it is: rows are packed when they are trained, in a second or two.
        return meta if preprocess else self._pack(cfg, settings, meta)

    def _pack(self, cfg: Any, settings: Settings, meta: Any) -> Any:
        from axolotl.common.datasets import TrainDatasetMeta
        from axolotl.utils.trainer import calculate_total_num_steps

        assert settings.packing is not None
        strict = _is_strict(cfg, settings)
        train = collators.pack(meta.train_dataset, cfg.sequence_len, settings.packing, strict=strict, name="train")
        evaluation = meta.eval_dataset and collators.pack(
            meta.eval_dataset,
            cfg.eval_sequence_len or cfg.sequence_len,
            settings.packing,
            strict=strict,
            name="evaluation",
        )
        train = collators.evened(train, cfg.batch_size)
        if settings.packing.deal:
            train, self._dealt = collators.deal(train, cfg, settings.packing)
        self._packed, self._heldout = True, meta.eval_dataset
        steps = calculate_total_num_steps(cfg, train, update=False)
        return TrainDatasetMeta(train, evaluation, min(steps, cfg.max_steps) if cfg.max_steps else steps)

    def pre_model_load(self, cfg: Any) -> None:
        """Say what is active, where no hook before has."""
        self._settings(cfg)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Make packed rows exact for the model as it stands, adapters and kernels included, and prove it.

        Raises:
            ContaminationError: if nothing isolates it. Whatever `attn_implementation` says, no run starts that leaks.
        """
        settings = self._settings(cfg)
        if settings is None or packer(settings, cfg) is None:
            return
        self._model = weakref.ref(model)
        with in_yaml():
            LOG.info(f"sft-plugins isolation proved: {isolate(model)}")

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Packed rows carry a column that no model takes; dealt ones are trained in their order."""
        settings = self._settings(cfg)
        if settings is None or settings.packing is None or packer(settings, cfg) != "sft_plugins":
            return {}
        order = {"train_sampling_strategy": "sequential"} if settings.packing.deal else {}
        return {"remove_unused_columns": False, **order}

    def get_collator_cls_and_kwargs(
        self,
        cfg: Any,
        is_eval: bool = False,  # noqa: ARG002 (evaluation is isolated by the same collator)
    ) -> tuple[Any, dict[str, Any]] | None:
        """The collator for training or evaluation; None where Axolotl's own is as good."""
        settings = self._settings(cfg)
        if settings is None:
            return None
        if packer(settings, cfg) is not None:
            model = self._model() if self._model is not None else None
            if model is None:
                raise ContaminationError(
                    "Axolotl builds a collator before it has loaded a model.",
                    code="host_collator",
                    remedy="Use a supported version of Axolotl.",
                )
            return (collators.packed if self._packed else collators.documents), {"model": model}
        # Rows that an audit only warned of, or multipack's nested ones, are not for a collator that refuses them.
        if settings.masking is None or not _is_strict(cfg, settings) or cfg.sample_packing:
            return None
        return collators.padded, {}

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Audit rows that are not packed by us, as the trainer holds them. The collapse callback joins the trainer here;
        nothing is left for Axolotl to add.

        Raises:
            MaskingError: `audit`; `host_collator`, as in `post_trainer_create`.
        """
        settings = self._settings(cfg)
        if settings is None:
            return []
        if not self._audited:
            self._audit(cfg, settings, trainer.train_dataset, trainer.eval_dataset, trainer.processing_class)
        self._check_collator(cfg, trainer)
        if settings.collapse is not None and self._command == "train":
            heldout = self._heldout if self._packed else trainer.eval_dataset
            with in_yaml():
                collapse_callback(
                    settings.collapse, trainer.processing_class, heldout, eot_tokens=cfg.get("eot_tokens") or ()
                ).attach(trainer)
        return []

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Look again who collates, and who orders the rows: plug-ins may change a trainer at this hook.

        Raises:
            MaskingError: `host_collator`, if another plug-in's collator has taken the place of ours.
            PackingError: `not_dealt`, if rows that were dealt would be drawn in another order.
        """
        if self._settings(cfg) is None:
            return
        self._check_collator(cfg, trainer)
        if self._dealt is not None:
            with in_yaml():
                check_dealing(trainer, self._dealt)

    def _check_collator(self, cfg: Any, trainer: Any) -> None:
        if self.get_collator_cls_and_kwargs(cfg) is not None and not isinstance(trainer.data_collator, collators.OURS):
            raise MaskingError(
                f"batches are collated by {type(trainer.data_collator).__name__}, not by sft-plugins.",
                code="host_collator",
                remedy="Axolotl takes the first plug-in's collator: list sft_plugins.integrations.axolotl.SFTPlugin first.",
            )

    def post_train_unload(self, cfg: Any) -> None:  # noqa: ARG002
        """The run is over."""
        self._forget()

    def _settings(self, cfg: Any) -> Settings | None:
        """Our settings in this run, announced once; None where the plug-in takes no part."""
        raw = cfg.get(KEY)
        if raw is None or self._command in ("inference", "merge-lora"):
            return None
        settings = Settings.read(raw.to_dict())
        if not self._announced:
            self._announced = True
            LOG.info(active(self._command, settings, cfg))
            for line in warnings(self._command, cfg, settings):
                LOG.warning(line)
        return settings

    def _audit(self, cfg: Any, settings: Settings, train: Any, evaluation: Any, tokenizer: Any) -> None:
        self._audited = True
        if settings.masking is None:
            return
        ours = all(map(is_ours, dataset_entries(cfg)))
        for name, rows in (("train", train), ("evaluation", evaluation)):
            audit_rows(rows, tokenizer, name=name, level=settings.masking.audit, ours=ours)


def _is_strict(cfg: Any, settings: Settings) -> bool:
    """Whether every row has been shown to be exact, or is about to be."""
    masking = settings.masking
    return masking is not None and (masking.audit == "error" or all(map(is_ours, dataset_entries(cfg))))


class AxolotlCollapseCallback(ModeCollapseCallback):
    """The same callback; what it refuses when training begins is told in the words of the YAML."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        with in_yaml():
            super().on_train_begin(*args, **kwargs)


def collapse_callback(
    settings: CollapseSettings, tokenizer: Any, heldout: Any, *, eot_tokens: Sequence[str] = ()
) -> ModeCollapseCallback:
    """The callback, not yet attached; `heldout` are the evaluation rows before they were packed, or None.

    `eot_tokens` end answers for it as they do for masking, unless `collapse.stop_token_ids` names others.
    """
    stops = stop_token_ids(tokenizer, eot_tokens) if settings.stop_token_ids is None else settings.stop_token_ids
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
        boilerplate=settings.boilerplate,
        tools=settings.tools,
        chat_template_kwargs=settings.chat_template_kwargs,
        stop_token_ids=stops,
        report=settings.report,
    )
