"""Configurations that cannot be used: each refused with a message that names the file, the key and what to do."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_plugins.errors import AssetError
from sft_plugins.integrations import Overrides, read_plan

ROOT = Path(__file__).resolve().parents[2]
TRL = {"model_name_or_path": "m", "dataset_name": "d.jsonl"}
AXOLOTL = {"seed": 42, "base_model": "m", "datasets": [{"path": "d.jsonl", "type": "chat_template"}]}
PLUGIN = {"plugins": ["sft_plugins.integrations.axolotl.SFTPlugin"]}


def read(tmp_path: Path, config: Any, **overrides: Any) -> Any:
    path = tmp_path / "config.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config), encoding="utf-8")
    return read_plan(path, Overrides(**overrides))


BAD = {
    "broken YAML": ("base_model: m\ndatasets: [\n", "bad_config", "line 3"),
    "a list": ("- 1\n- 2\n", "bad_config", "list"),
    "empty": ("", "bad_config", "nothing"),
    "neither host's": ({"learning_rate": 1.0}, "unknown_config", "learning_rate"),
    "no model": ({"dataset_name": "d.jsonl", "max_length": 8}, "no_model", "model"),
    "no data": ({"model_name_or_path": "m"}, "no_data", "data"),
    "no data for Axolotl": ({"base_model": "m"}, "no_data", "data"),
    "no path": ({**AXOLOTL, "datasets": [{"type": "chat_template"}]}, "no_data", "datasets[0]"),
    "a negative length": ({**AXOLOTL, "sequence_len": -1}, "bad_config", "sequence_len: -1"),
    "a length of nothing": ({**TRL, "max_length": 0}, "bad_config", "max_length: 0"),
    "a length in words": ({**TRL, "max_length": "long"}, "bad_config", "max_length: long"),
    "an unknown packing strategy": ({**TRL, "packing_strategy": "best"}, "bad_config", "bfd_split"),
    "settings without the plug-in": ({**AXOLOTL, "sft_plugins": {}}, "unknown_key", "plugins"),
    "a typo in our settings": ({**AXOLOTL, **PLUGIN, "sft_plugins": {"maskin": {}}}, "bad_config", "masking"),
    "data that is no entry": ({**AXOLOTL, "datasets": ["rows.jsonl"]}, "bad_config", "rows.jsonl"),
    "data that is no list": ({**TRL, "datasets": "rows.jsonl"}, "bad_config", "rows.jsonl"),
    "devices in words": (
        {**AXOLOTL, **PLUGIN, "context_parallel_size": "two"},
        "bad_config",
        "context_parallel_size: two",
    ),
    "a missing template": ({**TRL, "chat_template_path": "no.jinja"}, "missing_file", "no.jinja"),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_configurations_are_refused_by_name(name: str, tmp_path: Path) -> None:
    config, code, words = BAD[name]
    with pytest.raises(AssetError) as error:
        read(tmp_path, config)
    assert error.value.code == code
    assert words in error.value.message + str(error.value.remedy)
    assert error.value.remedy


def test_a_deepspeed_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "zero3.json"
    config = {**AXOLOTL, **PLUGIN, "sequence_len": 64, "deepspeed": str(broken)}
    broken.write_text('{"zero_optimization": {"stage": 3')
    with pytest.raises(AssetError, match=r"zero3\.json.* cannot be read as JSON: .*line 1 column 34") as error:
        read(tmp_path, config)
    assert (error.value.code, error.value.remedy) == ("bad_config", "correct the file.")
    for text, contradicts in (('{"zero_optimization": {"stage": 3}}', True), ('{"zero_optimization": 3}', False)):
        broken.write_text(text)
        assert any("`deepspeed` stage 3" in found.message for found in read(tmp_path, config).findings) is contradicts


@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/axolotl_*.yaml")), ids=lambda path: path.stem)
def test_the_ready_configurations_are_read_without_a_fault(config: Path) -> None:
    plan = read_plan(config)
    assert (plan.host, plan.isolated) == ("Axolotl", True)
    assert all(entry.exact for entry in plan.entries)
    assert plan.findings == ()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="no such file") as error:
        read_plan(tmp_path / "none.yaml")
    assert error.value.code == "missing_file"


@pytest.mark.parametrize(
    ("config", "right"),
    [
        pytest.param(
            {**TRL, "packin": True}, "packing", marks=pytest.mark.skipif(not find_spec("trl"), reason="needs TRL")
        ),
        pytest.param(
            {**AXOLOTL, "sample_packin": True},
            "sample_packing",
            marks=pytest.mark.skipif(
                not find_spec("axolotl"), reason="Axolotl's keys are known where Axolotl is installed"
            ),
        ),
    ],
)
def test_a_misspelt_key_is_refused_with_the_right_one(config: dict[str, Any], right: str, tmp_path: Path) -> None:
    with pytest.raises(AssetError) as error:
        read(tmp_path, config)
    assert error.value.code == "unknown_key"
    assert f"`{right}`" in str(error.value.remedy)


@pytest.mark.skipif(not find_spec("trl"), reason="needs TRL")
def test_an_sft_config_as_json_is_read_with_model_and_data_given(tmp_path: Path) -> None:
    """Every key of `SFTConfig` is known, and its values are those that the plan has."""
    from trl import SFTConfig

    config = SFTConfig(str(tmp_path), packing=True, max_length=512, per_device_train_batch_size=3, use_cpu=True)
    path = tmp_path / "config.json"
    path.write_text(config.to_json_string(), encoding="utf-8")
    plan = read_plan(path, Overrides(model="m", data="d.jsonl", devices=2))
    assert (plan.host, plan.model, plan.entries[0].path) == ("TRL", "m", "d.jsonl")
    assert (plan.packer, plan.max_length, plan.batch_size, plan.devices) == ("host", 512, 3, 2)
    assert (plan.accumulation, plan.epochs) == (config.gradient_accumulation_steps, config.num_train_epochs)
    assert json.loads(path.read_text())["packing"] is True


@pytest.mark.skipif(not find_spec("trl"), reason="needs TRL")
def test_what_a_config_leaves_out_is_trls_own_default(tmp_path: Path) -> None:
    from trl import SFTConfig

    own = SFTConfig(str(tmp_path), use_cpu=True)
    plan = read(tmp_path, TRL)
    assert (plan.max_length, plan.batch_size) == (own.max_length, own.per_device_train_batch_size)
    assert (plan.accumulation, plan.epochs) == (own.gradient_accumulation_steps, own.num_train_epochs)
    assert (plan.packer, plan.max_steps) == (None, None)
    assert read(tmp_path, {**TRL, "max_length": None}).max_length is None


def test_the_plug_ins_settings_decide_who_packs(tmp_path: Path) -> None:
    def packer(**keys: Any) -> tuple[Any, bool]:
        plan = read(tmp_path, {**AXOLOTL, "sequence_len": 64, **keys})
        return plan.packer, plan.isolated

    assert packer() == (None, False)
    assert packer(sample_packing=True) == ("host", False)
    assert packer(**PLUGIN) == ("sft_plugins", True)
    assert packer(**PLUGIN, sample_packing=True) == ("host", True)
    assert packer(**PLUGIN, sft_plugins={"packing": False}) == (None, False)


def test_contradictions_of_the_plug_in_are_findings(tmp_path: Path) -> None:
    plan = read(tmp_path, {**AXOLOTL, **PLUGIN, "sequence_len": 64, "context_parallel_size": 2})
    found = [finding for finding in plan.findings if finding.code == "contradiction"]
    assert [finding.failure for finding in found] == ["P15"]
    assert found[0].remedy


def test_an_axolotl_run_without_a_seed_is_told_that_its_rows_are_drawn_anew(tmp_path: Path) -> None:
    without = {**AXOLOTL, "seed": None}
    (note,) = read(tmp_path, without).findings
    assert (note.level, note.code, note.unchecked) == ("note", "no_seed", "")
    entry = {**AXOLOTL["datasets"][0], "shards": 2}
    (note,) = read(tmp_path, {**without, "datasets": [entry]}).findings
    assert "which rows are in a shard" in note.unchecked


def test_a_named_template_is_axolotls_or_said_not_to_be_checked(tmp_path: Path) -> None:
    plan = read(tmp_path, {**AXOLOTL, "chat_template": "chatml"})
    if find_spec("axolotl"):
        assert "<|im_start|>" in str(plan.entries[0].chat_template)
        assert plan.findings == ()
    else:
        assert plan.entries[0].chat_template is None
        assert [(f.level, f.code) for f in plan.findings] == [("warning", "template_not_checked")]


def test_a_template_in_the_yaml_or_a_file_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}", encoding="utf-8")
    for given in ("{{ messages }}", str(file)):
        plan = read(tmp_path, {**AXOLOTL, "chat_template": "jinja", "chat_template_jinja": given})
        assert plan.entries[0].chat_template == "{{ messages }}"


@pytest.mark.parametrize("host", [TRL, AXOLOTL])
def test_every_one_of_several_data_files_is_looked_at(host: dict[str, Any], tmp_path: Path) -> None:
    entry = {"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "split": "train", "type": "chat_template"}
    plan = read(tmp_path, {**host, "datasets": [entry]})
    assert [(entry.path, entry.split) for entry in plan.entries] == [("a.jsonl", None), ("b.jsonl", None)]


def test_base_model_makes_it_axolotls_whatever_else_is_there(tmp_path: Path) -> None:
    assert read(tmp_path, {"base_model": "m", "datasets": [{"path": "d.jsonl"}]}).host == "Axolotl"


@pytest.mark.skipif(not find_spec("axolotl"), reason="a plug-in's keys are asked for where Axolotl is installed")
def test_a_plug_in_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="no_such_module"):
        read(tmp_path, {**AXOLOTL, "plugins": ["no_such_module.Plugin"]})


def test_data_of_trl_are_named_by_the_keys_that_name_them(tmp_path: Path) -> None:
    entries = read(tmp_path, {**TRL, "eval_strategy": "steps", "dataset_test_split": "test"}).entries
    assert [(one.where, one.split, one.evaluation) for one in entries] == [
        ("dataset_name", None, False),
        ("dataset_test_split", "test", True),
    ]
