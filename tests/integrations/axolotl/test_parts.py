"""The plug-in's parts by themselves: folders of prepared data, names of fields, collators as Axolotl builds them."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl", reason="the Axolotl plug-in runs in Axolotl's environment")

from datasets import Dataset
from transformers import DefaultDataCollator, Trainer, TrainingArguments

from sft_plugins.errors import MaskingError, PackingError, SFTPluginsError
from sft_plugins.integrations import _compat
from sft_plugins.integrations.axolotl import SFTPlugin, collators
from sft_plugins.integrations.axolotl.fields import RowFields
from sft_plugins.integrations.axolotl.prepared import separate_prepared_path
from sft_plugins.integrations.axolotl.settings import Settings
from sft_plugins.masking import StrictPromptMaskingCollator
from testkit.tiny_models import build
from testkit.tokenizers import build_tokenizer

STRATEGY = "sft_plugins.integrations.axolotl.strategy"


# --- prepared data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    build_tokenizer("qwen").save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    return {
        "base_model": str(tmp_path / "model"),
        "dataset_prepared_path": "kept",
        "sequence_len": 64,
        "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": STRATEGY}],
    }


def path_of(config: dict[str, Any], **masking: Any) -> str | None:
    return separate_prepared_path(Settings.read({"masking": masking}), config)


def test_the_same_yaml_finds_its_prepared_rows_again(config: dict[str, Any]) -> None:
    first = path_of(config)
    assert first is not None
    assert Path(first).parent == Path("kept")
    assert path_of(config) == first
    assert path_of({**config, "dataset_prepared_path": first}) == first, "validated twice"
    assert path_of(config, audit="warn") == first, "the audit changes no row"
    assert Path(str(path_of({**config, "dataset_prepared_path": None}))).parent == Path("last_run_prepared")


@pytest.mark.parametrize(
    "change",
    ["masking option", "sequence_len", "template setting", "template file", "tokenizer file", "data", "field names"],
)
def test_whatever_changes_masks_changes_the_folder(config: dict[str, Any], change: str) -> None:
    before = path_of(config)
    model, rows = Path(config["base_model"]), Path(config["datasets"][0]["path"])
    options: dict[str, Any] = {}
    if change == "masking option":
        options = {"train_on": "last"}
    elif change == "sequence_len":
        config["sequence_len"] = 65
    elif change == "template setting":
        config["chat_template"] = "llama3"
    elif change == "template file":
        (model / "chat_template.jinja").write_text("{{ messages }}")
    elif change == "tokenizer file":
        (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + " ")
    elif change == "data":
        rows.write_text('{"prompt": "a", "response": "c"}\n')
        os.utime(rows, ns=(1, 1))
    else:
        config["datasets"][0]["field_messages"] = "dialog"
    assert path_of(config, **options) != before


def test_rows_of_others_stay_where_axolotl_keeps_them(config: dict[str, Any]) -> None:
    config["datasets"][0]["type"] = "chat_template"
    assert path_of(config) is None


# --- fields -----------------------------------------------------------------------------------------------------------


def test_fields_are_renamed_and_the_rest_is_kept() -> None:
    fields = RowFields.of(
        {
            "field_messages": "dialog",
            "field_system": "setting",
            "field_tools": "functions",
            "message_property_mappings": {"role": "who", "content": "says"},
            "roles": {"assistant": ["bot"], "user": ["client"]},
            "message_field_training": "learn",
            "field_thinking": "thoughts",
        }
    )
    row = {
        "dialog": [
            {"who": "client", "says": "Hi"},
            {"who": "bot", "says": "Yes", "learn": False, "thoughts": "Hm", "name": "B"},
        ],
        "setting": "Be kind.",
        "functions": [{"name": "f"}],
        "id": 7,
    }
    assert fields.rename(row) == {
        "id": 7,
        "system": "Be kind.",
        "messages": [
            {"role": "user", "content": "Hi", "reasoning_content": None},
            {"role": "assistant", "content": "Yes", "reasoning_content": "Hm", "train": False, "name": "B"},
        ],
        "tools": [{"name": "f"}],
    }


def test_columns_beside_the_messages_keep_their_names_where_none_are_given() -> None:
    row = {"dialog": [], "system": "Be kind.", "tools": [], "chat_template_kwargs": {"enable_thinking": False}}
    renamed = RowFields.of({"field_messages": "dialog"}).rename(row)
    assert renamed == {"messages": row.pop("dialog"), **row}


def test_columns_that_nobody_renames_stay_for_the_masker_to_judge() -> None:
    """M28: a column of the prompt is not lost on the way."""
    renamed = RowFields.of({"field_messages": "dialog"}).rename({"dialog": [], "context": "In Paris.", "label": False})
    assert renamed == {"messages": [], "context": "In Paris.", "label": False}


def test_axolotls_own_defaults_change_nothing() -> None:
    """Validation fills these in for every data set."""
    fields = RowFields.of(
        {"path": "x", "type": STRATEGY, "message_property_mappings": {"role": "role", "content": "content"}}
    )
    assert fields.change_nothing
    row = {"prompt": "a", "response": "b"}
    assert fields.rename(row) == row


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("roles_to_train", ["user"]),
        ("train_on_eos", "none"),
        ("train_on_eot", "all"),
        ("message_field_training_detail", "parts"),
        ("drop_system_message", True),
        ("field", "text"),
    ],
)
def test_a_field_that_asks_for_another_mask_is_refused(name: str, value: Any) -> None:
    with pytest.raises(MaskingError, match=f"`{name}: ") as caught:
        RowFields.of({name: value})
    assert caught.value.code == "bad_option"


def test_a_missing_column_is_named() -> None:
    with pytest.raises(MaskingError, match="no list of messages in `dialog`; found columns text"):
        RowFields.of({"field_messages": "dialog"}).rename({"text": "a"})


# --- collators --------------------------------------------------------------------------------------------------------


def document(*ids: int) -> dict[str, list[int]]:
    return {"input_ids": list(ids), "labels": [-100, *ids[1:]], "attention_mask": [1] * len(ids), "length": [len(ids)]}


def test_nested_and_flat_documents_make_the_same_batch() -> None:
    model = build("llama").model
    collator = collators.documents(
        build_tokenizer("qwen"), padding=True, pad_to_multiple_of=None, model=model, return_tensors="pt"
    )
    a, b, c = document(5, 6, 7), document(8, 9), document(10, 11)
    nested, flat = collator([[a, b], [c]]), collator([a, b, c])
    assert nested["cu_seq_lens_q"].tolist() == [0, 3, 5, 7]
    assert nested["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert nested.keys() == flat.keys()
    assert all(torch.equal(torch.as_tensor(nested[key]), torch.as_tensor(flat[key])) for key in nested)


def test_padded_is_built_the_way_axolotl_builds() -> None:
    collator = collators.padded(build_tokenizer("qwen"), padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert isinstance(collator, StrictPromptMaskingCollator)
    assert collator([document(5, 6, 7)])["input_ids"].shape == (1, 8)


@pytest.mark.parametrize("asked", [{"padding": "max_length"}, {"return_tensors": "np"}])
def test_what_a_collator_would_have_to_ignore_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(SFTPluginsError, match="Axolotl asked for a collator with"):
        collators.padded(build_tokenizer("qwen"), **asked)


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
