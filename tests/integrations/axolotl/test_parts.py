"""The plug-in's parts by themselves: folders of prepared data, names of fields, collators as Axolotl builds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl", reason="the Axolotl plug-in runs in Axolotl's environment")


from sft_plugins.errors import MaskingError, SFTPluginsError
from sft_plugins.integrations.axolotl import collators
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
