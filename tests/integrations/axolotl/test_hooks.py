"""The plug-in's hooks: versions, runs one after the other in one process, the order of dealt rows."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="the Axolotl plug-in runs in Axolotl's environment")

from datasets import Dataset
from transformers import DefaultDataCollator, Trainer, TrainingArguments

from sft_plugins.errors import MaskingError, PackingError, SFTPluginsError
from sft_plugins.integrations import _compat
from sft_plugins.integrations.axolotl import SFTPlugin, collators
from sft_plugins.integrations.axolotl.settings import Settings
from sft_plugins.masking import PromptMasker
from testkit.tiny_models import build
from testkit.tokenizers import build_tokenizer

STRATEGY = "sft_plugins.integrations.axolotl.strategy"


# --- versions ---------------------------------------------------------------------------------------------------------


def test_an_old_host_is_no_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axolotl 0.19 swallows an ImportError of a plug-in and trains without it."""
    monkeypatch.setitem(_compat.SUPPORTED, "axolotl", "99")
    with pytest.raises(SFTPluginsError, match="axolotl >= 99 is needed") as caught:
        SFTPlugin()
    assert not isinstance(caught.value, ImportError)


def test_without_our_key_every_hook_does_nothing() -> None:
    from axolotl.utils.dict import DictDefault

    plugin, cfg = SFTPlugin(), DictDefault({"sample_packing": True})
    trainer = object()  # would fail at the first touch
    assert plugin.load_datasets(cfg) is None
    assert plugin.get_training_args(cfg) == {}
    assert plugin.get_collator_cls_and_kwargs(cfg) is None
    assert plugin.add_callbacks_post_trainer(cfg, trainer) == []
    plugin.pre_model_load(cfg)
    plugin.post_model_load(cfg, trainer)
    plugin.post_trainer_create(cfg, trainer)


def test_another_plugins_collator_in_the_place_of_ours_stops_the_run() -> None:
    """P13: Axolotl takes the first plug-in's answer, so one that is listed before ours may win."""
    from axolotl.utils.dict import DictDefault

    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    tokenizer = build_tokenizer("qwen")
    cfg = DictDefault({"sft_plugins": {"packing": False, "collapse": False, "masking": {"audit": "error"}}})
    cfg["datasets"] = [{"path": "x", "type": STRATEGY}]
    trainer = SimpleNamespace(
        train_dataset=rows, eval_dataset=None, processing_class=tokenizer, data_collator=collators.padded(tokenizer)
    )
    SFTPlugin().post_trainer_create(cfg, trainer)
    trainer.data_collator = DefaultDataCollator()
    with pytest.raises(MaskingError, match=r"collated by DefaultDataCollator.* list .*SFTPlugin first"):
        SFTPlugin().post_trainer_create(cfg, trainer)


# --- runs in one process ----------------------------------------------------------------------------------------------


def own(**rest: Any) -> Any:
    """A validated configuration whose rows our strategy masked, and its raw form."""
    from axolotl.utils.dict import DictDefault

    return DictDefault(
        {
            "plugins": ["sft_plugins.integrations.axolotl.SFTPlugin"],
            "sft_plugins": {"packing": False, "collapse": False},
            "datasets": [{"path": "x", "type": STRATEGY}],
            **rest,
        }
    )


def test_a_run_begins_afresh_in_the_same_instance(caplog: pytest.LogCaptureFixture) -> None:
    """Axolotl 0.21 keeps the instances of an earlier run: what they know of it must not reach the next."""
    tokenizer = build_tokenizer("qwen")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = Dataset.from_list([{"input_ids": [5, 6, stop], "labels": [-100, 6, stop]}])
    trainer = SimpleNamespace(
        train_dataset=rows, eval_dataset=None, processing_class=tokenizer, data_collator=collators.padded(tokenizer)
    )
    plugin = SFTPlugin()
    for _ in range(2):
        plugin.register(own())
        for _ in range(2):
            plugin.add_callbacks_post_trainer(own(), trainer)
    told = [record.getMessage() for record in caplog.records]
    assert sum(" is active: " in line for line in told) == 2
    assert sum("audit of train rows: 1 rows" in line for line in told) == 2


def test_eot_tokens_end_answers_for_the_masker_and_for_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """C12: `eot_tokens` reached the masker alone, so the watch let answers run on."""
    from sft_plugins.integrations.axolotl.plugin import AxolotlCollapseCallback
    from sft_plugins.integrations.axolotl.strategy import build_masker

    tokenizer, joined = build_tokenizer("qwen"), []
    monkeypatch.setattr(AxolotlCollapseCallback, "attach", lambda self, trainer: joined.append(self))
    stop = tokenizer.convert_tokens_to_ids("<|im_start|>")
    rows = Dataset.from_list(
        [{"input_ids": [5, 6, tokenizer.eos_token_id], "labels": [-100, 6, tokenizer.eos_token_id]}]
    )
    trainer = SimpleNamespace(
        train_dataset=rows, eval_dataset=None, processing_class=tokenizer, data_collator=collators.padded(tokenizer)
    )
    for collapse in ({}, {"stop_token_ids": [7]}):
        ours = {"packing": False, "collapse": collapse}
        cfg = own(sft_plugins=ours, eot_tokens=["<|im_start|>"], sequence_len=64)
        plugin = SFTPlugin()
        plugin.register(cfg)
        plugin._command = "train"  # as its hook for data does
        plugin.add_callbacks_post_trainer(cfg, trainer)
        masks = build_masker(tokenizer, cfg, {}).stop_token_ids
        assert masks == {tokenizer.eos_token_id, stop}
        assert set(joined[-1]._options.stop_token_ids) == ({7} if collapse else set(masks))


@pytest.mark.parametrize(
    ("asked", "rows", "processes"), [(None, 3, None), (1, 3, None), (2, 3, 2), (2, 2, 2), (2, 1, None)]
)
def test_masking_takes_processes_where_there_is_more_than_one_row(
    asked: int | None, rows: int, processes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_plugins.integrations.axolotl import strategy
    from sft_plugins.integrations.axolotl.fields import RowFields

    own, taken = strategy.mask_dataset, []

    def mask(data: Dataset, masker: Any, *, num_proc: int | None) -> Any:
        taken.append(num_proc)
        return own(data, masker)

    monkeypatch.setattr(strategy, "mask_dataset", mask)
    data = Dataset.from_list([{"prompt": "a", "response": "b"}] * rows)
    masking = strategy.MaskingStrategy(PromptMasker(build_tokenizer("qwen")), RowFields.of({}))
    assert len(masking.wrap_dataset(data, process_count=asked)) == rows
    assert taken == [processes]


def test_commands_that_only_load_a_model_leave_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    plugin, packs = SFTPlugin(), own(sft_plugins={}, sequence_len=64)
    plugin.register(own(merge_lora=True))
    assert "takes no part in `axolotl merge-lora`" in caplog.text
    assert plugin.get_training_args(packs) == {}
    plugin.post_model_load(packs, object())  # would fail at the first touch
    plugin.register(packs)
    assert plugin.get_training_args(packs) == {"remove_unused_columns": False}


def test_a_run_that_does_not_name_the_plugin_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    SFTPlugin().register(own(plugins=["other.Plugin"], inference=True))
    assert "sft-plugins" not in caplog.text


def test_packing_by_axolotl_alone_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    SFTPlugin().pre_model_load(own(sample_packing=True))
    assert "nothing proves that packed documents do not see one another" in caplog.text


def test_packed_rows_come_out_even_for_the_optimizer_steps() -> None:
    """P14: 3 rows of 5 documents, 2 rows to a step: one is taken apart, and no document is lost or doubled."""
    from sft_plugins.integrations.axolotl.collators import evened

    rows = {"input_ids": [[5, 6, 7, 8], [9, 3, 4], [2, 2]], "labels": [[-100, 6, -100, 8], [-100, 3, 4], [-100, 2]]}
    packed = Dataset.from_dict(rows | {"seq_lengths": [[2, 2], [3], [2]]})
    even = evened(packed, 2)
    assert len(even) == 4
    assert sorted(length for row in even for length in row["seq_lengths"]) == [2, 2, 2, 3]
    assert evened(even, 2) is even


@pytest.mark.parametrize("share", [False, True])
def test_share_prefixes_of_the_yaml_folds_the_rows(share: bool) -> None:
    beginning = list(range(10, 40))
    rows = [{"input_ids": [*beginning, i, 2], "labels": [-100] * 30 + [i, 2]} for i in (50, 51)]
    settings = Settings.model_validate({"packing": {"share_prefixes": share}}).packing
    assert settings is not None
    (packed,) = collators.pack(Dataset.from_list(rows), 64, settings, strict=True, name="train")
    assert len(packed["input_ids"]) == (35 if share else 64)
    assert ("seq_parents" in packed) is share


def dealt(tmp_path: Path, **arguments: Any) -> tuple[SFTPlugin, Any, Any]:
    """The plug-in after it has dealt rows for two accumulated rows in one process, its YAML, and a trainer of these rows."""
    from sft_plugins.integrations.axolotl.collators import deal
    from sft_plugins.integrations.axolotl.settings import PackingSettings

    cfg = own(sft_plugins={"packing": {"deal": True}, "collapse": False}, sequence_len=8)
    cfg.micro_batch_size, cfg.gradient_accumulation_steps, cfg.batch_size = 1, 2, 2
    lengths = [[8], [1] * 8, [4, 4], [7, 1]]
    rows = [{"input_ids": [5] * 8, "labels": [-100] + [5] * 7, "seq_lengths": each} for each in lengths]
    plugin = SFTPlugin()
    plugin._command = "train"
    packed, plugin._dealt = deal(Dataset.from_list(rows), cfg, PackingSettings(deal=True))
    model = build("llama").model
    plugin._packed, plugin._model = True, weakref.ref(model)
    own_arguments = {**plugin.get_training_args(cfg), "gradient_accumulation_steps": 2, **arguments}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=1, **own_arguments),
        train_dataset=packed,
        data_collator=collators.packed(build_tokenizer("qwen"), model=model),
    )
    return plugin, cfg, trainer


def test_a_trainer_that_keeps_the_order_of_dealt_rows_is_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plugin, cfg, trainer = dealt(tmp_path)
    plugin.post_trainer_create(cfg, trainer)
    assert "packed here and dealt to ranks)" in caplog.text
    assert "dealt the train rows (attention counted alone): 4 rows on 1 ranks, 2 steps" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"train_sampling_strategy": "random"}, r"RandomSampler.*or set `sft_plugins\.packing\.deal: false`"),
        (
            {"gradient_accumulation_steps": 4},
            r"accumulation 4, dealt for 2 Remedy: set `sft_plugins\.packing\.deal: false`",
        ),
    ],
)
def test_a_trainer_that_loses_the_dealing_stops_before_the_first_step(
    tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    plugin, cfg, trainer = dealt(tmp_path, **arguments)
    with pytest.raises(PackingError, match=said):
        plugin.post_trainer_create(cfg, trainer)


def test_rows_that_cannot_be_taken_apart_are_kept_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sft_plugins.integrations.axolotl.collators as module

    said: list[str] = []
    monkeypatch.setattr(module.LOG, "warning", said.append)
    alone = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[-100, 6]], "seq_lengths": [[2]]})
    assert module.evened(alone, 4) is alone
    assert "trained twice" in said[0]
