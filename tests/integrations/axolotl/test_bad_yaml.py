"""Wrong YAML is refused at validation, in the words of the YAML, with what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="the Axolotl plug-in runs in Axolotl's environment")

from pydantic import ValidationError

from sft_plugins.integrations.axolotl.settings import Settings
from sft_plugins.integrations.axolotl.validation import SFTPluginsArgs

PLUGIN = "sft_plugins.integrations.axolotl.SFTPlugin"
STRATEGY = "sft_plugins.integrations.axolotl.strategy"


def yaml(ours: Any = None, **rest: Any) -> dict[str, Any]:
    """A good configuration, changed."""
    base = {
        "base_model": "tiny",
        "plugins": [PLUGIN],
        "datasets": [{"path": "rows.jsonl", "type": STRATEGY}],
        "sequence_len": 64,
    }
    merged = {**base, "sft_plugins": {} if ours is None else ours, **rest}
    return {key: value for key, value in merged.items() if value != "absent"}


def own_rows(type_: str = "chat_template") -> list[dict[str, str]]:
    return [{"path": "rows.jsonl", "type": type_}]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a list": (yaml(["masking"]), r"sft_plugins: expected keys and values, or false; got \['masking'\]"),
    "unknown part": (yaml({"maskin": {}}), r"sft_plugins: unknown key `maskin`. Did you mean `masking`\?"),
    "unknown masking key": (
        yaml({"masking": {"overflw": "drop"}}),
        r"sft_plugins.masking: unknown key `overflw`. Did you mean `overflow`\? Known: audit, train_on",
    ),
    "unknown packing key": (
        yaml({"packing": {"max_length": 5}}),
        "sft_plugins.packing: unknown key `max_length`. Known: by, unsupervised, share_prefixes, seed",
    ),
    "unknown collapse key": (yaml({"collapse": {"prompt": "x"}}), "Did you mean `prompts`"),
    "unknown detector key": (yaml({"collapse": {"detector": {"warn": 1}}}), "`detector` has the unknown key `warn`"),
    "a part that is a word": (
        yaml({"masking": "strict"}),
        "sft_plugins.masking: expected keys and values, or false; got 'strict'",
    ),
    "wrong audit": (
        yaml({"masking": {"audit": "loud"}}),
        r"sft_plugins.masking.audit: Input should be 'error', 'warn' or 'off' \(got 'loud'",
    ),
    "wrong overflow": (
        yaml({"masking": {"overflow": "cut"}}),
        "sft_plugins.masking.overflow: Input should be 'raise', 'drop'",
    ),
    "wrong packer": (
        yaml({"packing": {"by": "me"}}),
        "sft_plugins.packing.by: Input should be 'auto', 'sft_plugins' or 'axolotl'",
    ),
    "wrong seed": (yaml({"packing": {"seed": "x"}}), "sft_plugins.packing.seed: Input should be a valid integer"),
    "wrong deal": (yaml({"packing": {"deal": 2}}), "sft_plugins.packing.deal: Input should be a valid boolean"),
    "dealing their packing": (
        yaml({"packing": {"deal": True}}, sample_packing=True),
        "sft_plugins.packing.deal is for our own packing, and here `sample_packing: true` packs",
    ),
    "dealing in another order": (
        yaml({"packing": {"deal": True}}, curriculum_sampling=True),
        "`curriculum_sampling` keeps the order of rows, and packing changes it",
    ),
    "one sample": (
        yaml({"collapse": {"samples_per_prompt": 1}}),
        "samples_per_prompt: Input should be greater than or equal to 2",
    ),
    "budget": (
        yaml({"collapse": {"budget": 3}}),
        "sft_plugins.collapse.budget: Input should be less than or equal to 1",
    ),
    "wrong action": (yaml({"collapse": {"on_collapse": "halt"}}), "on_collapse: Input should be 'warn' or 'stop'"),
    "no prompt file": (
        yaml({"collapse": {"prompts": "nowhere.jsonl"}}),
        "sft_plugins.collapse: `prompts` names no file: 'nowhere.jsonl'",
    ),
    "bands": (
        yaml({"collapse": {"detector": {"warn_below": 0.1}}}),
        "critical_below < warn_below < info_below must hold",
    ),
    "all off": (
        yaml({"masking": False, "packing": False, "collapse": False}, datasets=own_rows()),
        "every part is off",
    ),
    "two packers": (
        yaml({"packing": {"by": "sft_plugins"}}, sample_packing=True),
        "would pack twice. Remedy: remove `sample_packing`, or set `sft_plugins.packing.by: axolotl`",
    ),
    "our options, their packing": (
        yaml({"packing": {"seed": 1}}, sample_packing=True),
        "sft_plugins.packing.seed is for our own packing, and here `sample_packing: true` packs",
    ),
    "nobody packs": (
        yaml({"packing": {"by": "axolotl"}}),
        "`sample_packing` is not true. Remedy: set `sample_packing: true`",
    ),
    "no sequence_len": (yaml(sequence_len="absent"), "sft_plugins.packing needs `sequence_len`"),
    "context parallelism": (yaml(context_parallel_size=2), "`context_parallel_size: 2` splits rows"),
    "sequence parallelism": (yaml(sequence_parallel_degree=2), "`sequence_parallel_degree: 2` splits rows"),
    "context parallelism, nested": (yaml(context_parallel={"size": 2}), "`context_parallel.size: 2` splits rows"),
    "labels balanced": (yaml(balance_labels=True), "`balance_labels` knows only Axolotl's own collators"),
    "multimodal": (yaml(processor_type="AutoProcessor"), "`processor_type` makes multimodal batches; only text"),
    "preferences": (yaml(rl="dpo"), "`rl` works on preference data: not together with sft_plugins"),
    "pretraining": (yaml(pretraining_dataset="x"), "`pretraining_dataset` has no prompts"),
    "streaming": (yaml(streaming=True), "`streaming` streams rows"),
    "skipped preparation": (yaml(skip_prepare_dataset=True), "`skip_prepare_dataset` leaves rows without labels"),
    "prompts trained": (
        yaml(train_on_inputs=True),
        "`train_on_inputs: true` puts loss on prompts.*Remedy: remove it, or set `sft_plugins.masking: false`",
    ),
    "options without effect": (
        yaml({"masking": {"train_on": "last"}}, datasets=own_rows()),
        "sft_plugins.masking.train_on has no effect: no dataset is masked by the plug-in",
    ),
    "strategy without masking": (yaml({"masking": False}), "Remedy: leave masking on"),
    "sharded by FSDP 1": (
        yaml(fsdp_config={"reshard_after_forward": True}),
        "`fsdp_config` without `fsdp_version: 2` wraps the model.*Remedy: set `fsdp_version: 2`, use DDP",
    ),
    "watched and sharded": (
        yaml({"packing": False}, fsdp_version=2, fsdp_config={"reshard_after_forward": True}),
        "`fsdp_config` shards the weights.*Remedy: set `sft_plugins.collapse: false`, or use DDP",
    ),
    "weights on one rank": (
        yaml(fsdp_version=2, fsdp_config={"cpu_ram_efficient_loading": True}),
        "`fsdp_config.cpu_ram_efficient_loading: true` loads weights on one rank only",
    ),
    "sharded by DeepSpeed": (
        yaml({"collapse": False}, deepspeed={"zero_optimization": {"stage": 3}}),
        "`deepspeed` stage 3 shards the model before.*Remedy: use stage 2",
    ),
    "watched and sharded by DeepSpeed": (
        yaml({"packing": False}, deepspeed={"zero_optimization": {"stage": 3}}),
        "`deepspeed` stage 3 shards the weights.*Remedy: set `sft_plugins.collapse: false`, or use DDP",
    ),
    "flattened twice": (yaml(batch_flattening=True), "`batch_flattening` flattens rows a second time"),
    "boundaries removed": (yaml(remove_unused_columns=True), "would remove where documents end"),
    "order kept": (yaml(curriculum_sampling=True), "`curriculum_sampling` keeps the order"),
    "sorted": (yaml(group_by_length=True), "`group_by_length` sorts rows by length"),
    "evaluation packed by them": (yaml(eval_sample_packing=True), "`eval_sample_packing` without `sample_packing`"),
    "plug-in not listed": (yaml(plugins=[]), "`plugins:` does not list the plug-in. Remedy: add"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_yaml_is_refused_with_its_remedy(name: str) -> None:
    data, message = BAD[name]
    with pytest.raises(ValidationError, match=message):
        SFTPluginsArgs(**data)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        SFTPluginsArgs(**yaml({"masking": {"overflow": "cut"}, "packing": {"by": "me"}}))
    assert "sft_plugins.masking.overflow" in str(caught.value)
    assert "sft_plugins.packing.by" in str(caught.value)


def test_deepspeed_stage_is_read_from_its_file(tmp_path: Path) -> None:
    for stage in (2, 3):
        path = tmp_path / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        if stage == 2:
            SFTPluginsArgs(**yaml(deepspeed=str(path)))
        else:
            with pytest.raises(ValidationError, match="stage 3 shards the model"):
                SFTPluginsArgs(**yaml(deepspeed=str(path)))


GOOD = {
    "empty": ({}, {}),
    "bare key": (None, {}),
    "only two parts": ({"collapse": False}, {}),
    "packing by them": ({}, {"sample_packing": True}),
    "packing by them, said": ({"packing": {"by": "axolotl"}}, {"sample_packing": True}),
    "their rows, audited": ({"masking": {"audit": "warn"}}, {"datasets": own_rows()}),
    "sharded by FSDP 2": ({"collapse": False}, {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}),
    "sharded by FSDP 2, said inside": ({"collapse": False}, {"fsdp_config": {"version": 2}}),
    "collapse alone": (
        {"masking": False, "packing": False},
        {"datasets": own_rows(), "train_on_inputs": True, "sequence_len": "absent"},
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_yaml_is_accepted(name: str) -> None:
    ours, rest = GOOD[name]
    data = yaml(**rest)
    data["sft_plugins"] = ours
    assert SFTPluginsArgs(**data).sft_plugins == (ours or {})


def test_a_missing_key_means_the_defaults_where_the_plugin_is_listed() -> None:
    data = yaml()
    del data["sft_plugins"]
    assert SFTPluginsArgs(**data).sft_plugins == {}


def test_the_plugin_is_known_by_either_spelling() -> None:
    """Axolotl 0.21 also takes `module:Class`."""
    assert SFTPluginsArgs(**yaml(plugins=["sft_plugins.integrations.axolotl:SFTPlugin"])).sft_plugins == {}


def test_a_run_without_the_plugin_is_left_alone() -> None:
    """Axolotl keeps the plug-ins, and so this class, of an earlier run in the same process."""
    data = yaml(plugins=["other.Plugin"], rl="dpo")
    del data["sft_plugins"]
    assert SFTPluginsArgs(**data).sft_plugins is None


def test_yaml_switches_mean_what_they_say() -> None:
    """YAML 1.1 reads a bare `off` as false and `on` as true."""
    settings = Settings.read({"masking": {"audit": False}, "packing": True, "collapse": False})
    assert settings.masking is not None
    assert settings.masking.audit == "off"
    assert settings.packing is not None
    assert settings.collapse is None
    off = Settings.read({"collapse": {"budget": False, "embedder": False, "baseline": False}}).collapse
    assert off is not None
    assert (off.budget, off.embedder, off.baseline) == ("off", "off", "off")


def test_axolotls_own_validation_reports_our_words_and_keeps_our_key() -> None:
    """Through the class that Axolotl builds of its own configuration and ours: false must stay false."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    def whole(ours: Any) -> DictDefault:
        rest = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "num_epochs": 1}
        return DictDefault(yaml(ours, **rest))

    manager = PluginManager.get_instance()
    before = dict(manager.plugins)
    try:
        manager.register(PLUGIN)
        validated = validate_config(whole({"packing": False, "masking": {"train_on": "last"}}))
        with pytest.raises(ValidationError, match=r"sft_plugins\.masking: unknown key `nope`"):
            validate_config(whole({"masking": {"nope": 1}}))
    finally:
        manager.plugins.clear()
        manager.plugins.update(before)
    assert validated.sft_plugins == {"packing": False, "masking": {"train_on": "last"}}
    assert "sft_plugins-" in validated.dataset_prepared_path
