"""Preflight judges what the run will do, or says that it did not look: tokens, steps, other trainings, keys, attention."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset
from transformers import AutoConfig

from sft_plugins.errors import AssetError
from sft_plugins.integrations import read_plan
from sft_plugins.preflight import Verdict, run_preflight
from sft_plugins.preflight.masks import null_filled
from testkit.conversations import assistant, user
from testkit.tokenizers import CHATML, build_tokenizer

PLUGIN = {"plugins": ["sft_plugins.integrations.axolotl.SFTPlugin"]}
OURS = {"type": "sft_plugins.integrations.axolotl.strategy"}
ROWS = [{"messages": [user(f"What is {i} + {i}?"), assistant(f"It is {2 * i}.")]} for i in range(100)]


def run_of(folder: Path, *, rows: list[dict[str, Any]] = ROWS, tokenizer: Any = None, **keys: Any) -> Path:
    """An Axolotl YAML (`model_type` and `entry` apart) over `rows`, with its model and data."""
    model, data, entry = folder / "model", folder / "rows.jsonl", keys.pop("entry", {})
    (tokenizer or build_tokenizer("qwen", eos="<|im_end|>")).save_pretrained(model)
    AutoConfig.for_model(keys.pop("model_type", "llama")).save_pretrained(model)
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first = {"path": str(data), "ds_type": "json", "type": "chat_template", **entry}
    path = folder / "axolotl.yaml"
    path.write_text(
        yaml.safe_dump({"base_model": str(model), "seed": 42, "datasets": [first], "sequence_len": 80, **keys})
    )
    return path


def verdict_of(folder: Path, **keys: Any) -> Verdict:
    return run_preflight(read_plan(run_of(folder, **keys)))


def told(verdict: Verdict) -> list[str]:
    return [f"{f.level} {f.code}: {f.message}" for f in verdict.findings]


# --- tokens -----------------------------------------------------------------------------------------------------------

CHATML_TOKENS = {"special_tokens": {"eos_token": "<|turn_end|>", "pad_token": "<|pad|>"}, "tokens": ["<|turn|>"]}
TURNS = CHATML.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|turn_end|>")


def test_the_chatml_recipe_on_a_base_tokenizer_is_green(tmp_path: Path) -> None:
    """The tokenizer knows neither marker and has no template: the YAML makes them tokens, and EOS the one that ends a turn."""
    base = build_tokenizer("qwen")
    base.chat_template = None
    template = {"chat_template": "jinja", "chat_template_jinja": TURNS}
    verdict = verdict_of(tmp_path, tokenizer=base, **template, **CHATML_TOKENS)
    assert verdict.colour == "green", told(verdict)
    assert set(verdict.entries[0].report.stop_tokens) == {"<|turn_end|>"}
    without = verdict_of(tmp_path, tokenizer=base, **template)
    assert without.colour == "red", "without those keys its answers end on no stop token"


def test_a_new_special_token_under_an_adapter_is_refused_as_axolotl_refuses_it(tmp_path: Path) -> None:
    template = {"chat_template": "jinja", "chat_template_jinja": TURNS}
    with pytest.raises(AssetError, match=r"special_tokens\.eos_token.* new to the tokenizer") as error:
        verdict_of(tmp_path, adapter="lora", **template, **CHATML_TOKENS)
    assert "lora_modules_to_save: [embed_tokens, lm_head]" in str(error.value.remedy)
    saved = {"adapter": "lora", "lora_modules_to_save": ["embed_tokens", "lm_head"]}
    assert verdict_of(tmp_path, **saved, **template, **CHATML_TOKENS).colour == "green"


@pytest.mark.parametrize("entry", [{}, OURS])
def test_eot_tokens_end_answers_for_the_masker(tmp_path: Path, entry: dict[str, Any]) -> None:
    keys: dict[str, Any] = {
        "chat_template": "jinja",
        "chat_template_jinja": TURNS,
        "tokens": ["<|turn|>", "<|turn_end|>"],
    }
    keys |= {"entry": entry, **(PLUGIN if entry else {})}
    assert verdict_of(tmp_path, eot_tokens=["<|turn_end|>"], **keys).colour == "green"
    assert verdict_of(tmp_path, **keys).colour == "red"
    with pytest.raises(AssetError, match="no single token"):
        verdict_of(tmp_path, eot_tokens=["<|no_such|>"], **keys)


def test_added_tokens_are_renamed_by_id(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("qwen", eos="<|im_end|>")
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    renamed = {"chat_template": "jinja", "chat_template_jinja": TURNS}
    overrides = {"added_tokens_overrides": dict(zip(ids, ("<|turn|>", "<|turn_end|>"), strict=True))}
    verdict = verdict_of(tmp_path, special_tokens={"eos_token": "<|turn_end|>"}, **renamed, **overrides)
    assert verdict.colour == "green", told(verdict)
    assert set(verdict.entries[0].report.stop_tokens) == {"<|turn_end|>"}
    with pytest.raises(AssetError, match="5 is no id of an added token"):
        verdict_of(tmp_path, added_tokens_overrides={5: "<|turn|>"}, **renamed)


# --- steps ------------------------------------------------------------------------------------------------------------

STEPS = {
    "all of them": ({}, {}, 50),
    "max_steps": ({"max_steps": 25}, {}, 25),
    "max_steps beyond the epochs": ({"max_steps": 70}, {}, 70),
    "held out by share": ({"val_set_size": 0.9}, {}, 5),
    "held out by number": ({"val_set_size": 90}, {}, 5),
    "a shard": ({}, {"shards": 10}, 5),
    "a node's shard": ({"dataset_shard_num": 10, "dataset_shard_idx": 3}, {}, 5),
    "a slice": ({}, {"split": "train[:10]"}, 5),
    "a slice by share": ({}, {"split": "train[90%:]"}, 5),
    "epochs": ({"num_epochs": 3}, {}, 150),
    "a share of an epoch": ({"num_epochs": 1.5, "gradient_accumulation_steps": 4}, {}, 19),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_that_axolotl_makes(name: str, tmp_path: Path) -> None:
    keys, entry, steps = STEPS[name]
    verdict = verdict_of(tmp_path, micro_batch_size=2, entry=entry, **keys)
    assert verdict.cost is not None
    assert verdict.cost.steps == steps


def test_rows_for_evaluation_make_no_steps(tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(map(json.dumps, ROWS)))
    verdict = verdict_of(
        tmp_path, rows=ROWS[:10], micro_batch_size=2, test_datasets=[{"path": str(test), "type": "chat_template"}]
    )
    assert verdict.cost is not None
    assert verdict.cost.steps == 5
    assert [check.report.rows_in for check in verdict.entries] == [10, 100]


def test_a_shard_holds_the_rows_that_axolotl_would_train(tmp_path: Path) -> None:
    from sft_plugins.integrations.axolotl.preflight.steps import sharded

    rows = Dataset.from_list([{"i": i} for i in range(23)])
    for seed in (None, 7):
        for index in range(4):
            wanted = rows.shuffle(seed=42 if seed is None else seed).shard(num_shards=4, index=index)["i"]
            chosen = sharded({"shards": 4, "shards_idx": index}, {"seed": seed}, "x.yaml")
            assert chosen is not None
            assert chosen(23) == list(wanted)


def test_nothing_left_to_train_is_said(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, val_set_size=100)
    assert any("all 100 are held out" in line for line in told(verdict))
    assert verdict.colour == "red"
    with pytest.raises(AssetError, match="would hold out every row"):
        verdict_of(tmp_path, val_set_size=1.0)


@pytest.mark.parametrize(
    ("keys", "steps"), [({}, 39), ({"max_steps": 7}, 7), ({"max_steps": -1}, 39), ({"max_steps": 400}, 400)]
)
def test_trls_steps(keys: dict[str, Any], steps: int, tmp_path: Path) -> None:
    """100 rows, batches of 2, 4 accumulated: 13 an epoch, three epochs by default."""
    axolotl = run_of(tmp_path)
    config = {"model_name_or_path": str(axolotl.parent / "model"), "dataset_name": str(axolotl.parent / "rows.jsonl")}
    config |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_length": 80, **keys}
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(config))
    verdict = run_preflight(read_plan(tmp_path / "trl.yaml"))
    assert verdict.cost is not None
    assert verdict.cost.steps == steps


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"entry": {"shards": 4, "shards_idx": 9}}, "shards_idx: 9"),
        ({"entry": {"shards": 300, "shards_idx": 299}}, "no row in its shard"),
        ({"chat_template": "jinja"}, "without `chat_template_jinja:`"),
    ],
)
def test_shards_and_templates_that_are_not_there_are_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=words):
        verdict_of(tmp_path, **keys)


def test_sharegpt_roles_are_axolotls_where_properties_are_mapped(tmp_path: Path) -> None:
    rows = [{"turns": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}] * 3
    entry = {"field_messages": "turns", "message_property_mappings": {"role": "from", "content": "value"}}
    verdict = verdict_of(tmp_path, rows=rows, entry=entry)
    assert verdict.colour == "green", told(verdict)


# --- what is no supervised fine-tuning, or written in words of the host -----------------------------------------------

PAIRS = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3


@pytest.mark.parametrize(
    "keys",
    [{"rl": "dpo"}, {"rl": "kto"}, {"reward_model": True}, {"pretraining_dataset": "some/text", "max_steps": 5}],
    ids=lambda keys: next(iter(keys)),
)
def test_other_trainings_are_valid_and_not_judged(keys: dict[str, Any], tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, rows=PAIRS, entry={"type": "chat_template.default"}, **keys)
    assert verdict.colour == "amber"
    assert [f.code for f in verdict.findings if f.level != "note"] == ["not_judged"]
    assert verdict.not_checked[0] == f"rows and masks of `{next(iter(keys))}`"


@pytest.mark.parametrize(
    "kind",
    ["alpaca", "input_output", {"field_instruction": "q", "field_output": "a", "format": "{instruction}"}],
    ids=str,
)
def test_prompts_in_words_of_the_host_are_amber_whatever_their_columns(kind: Any, tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, rows=[{"q": "Why?", "a": "So."}] * 3, entry={"type": kind})
    assert verdict.colour == "amber"
    assert [f.code for f in verdict.findings] == ["not_rendered"]
    assert "prompts and masks of datasets[0]" in verdict.not_checked


def test_faults_of_rows_show_though_the_host_writes_the_prompt(tmp_path: Path) -> None:
    rows = [{"instruction": "Say it", "output": ""}, {"instruction": "Say it", "output": "So."}]
    found = {f.code: f.level for f in verdict_of(tmp_path, rows=rows, entry={"type": "alpaca"}).findings}
    assert found == {"not_rendered": "warning", "empty_response": "error"}


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_axolotl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Axolotl is not installed."""
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "axolotl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "axolotl", None)


@pytest.mark.usefixtures("no_axolotl")
def test_a_misspelt_key_is_refused_without_axolotl_too(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="`micro_batchsize` is no key of Axolotl") as error:
        read_plan(run_of(tmp_path, micro_batchsize=8))
    assert (error.value.code, error.value.remedy) == ("unknown_key", "Did you mean `micro_batch_size`?")


@pytest.mark.usefixtures("no_axolotl")
def test_a_key_that_may_be_newer_or_another_plug_ins_is_said_not_to_be_checked(tmp_path: Path) -> None:
    for keys in ({"zzz_new_thing": 1}, {"micro_batchsize": 8, "plugins": ["someone.elses.Plugin"]}):
        verdict = verdict_of(tmp_path, **keys)
        assert verdict.colour == "amber"
        assert [f.code for f in verdict.findings] == ["keys_not_checked"]
        assert verdict.not_checked[0] == f"the keys {next(iter(keys))}"
    known = {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rope": True}
    assert verdict_of(tmp_path, **known).colour == "green"


@pytest.mark.usefixtures("no_axolotl")
def test_a_template_of_axolotls_on_a_tokenizer_without_one_is_not_judged(tmp_path: Path) -> None:
    base = build_tokenizer("qwen")
    base.chat_template = None
    verdict = verdict_of(tmp_path, tokenizer=base, chat_template="chatml", **CHATML_TOKENS)
    assert verdict.colour == "amber"
    assert [f.code for f in verdict.findings] == ["template_not_checked"]
    assert verdict.cost is None


@pytest.mark.skipif(not find_spec("axolotl"), reason="the list is made where Axolotl is installed")
def test_the_kept_keys_are_those_of_their_version() -> None:
    from importlib.metadata import version

    from sft_plugins.integrations.axolotl.preflight.keys import _kept, known_keys

    kept = _kept(["axolotl.integrations.liger.LigerPlugin"])
    if kept.source != f"Axolotl {version('axolotl')}":
        pytest.skip(f"kept of {kept.source}")
    assert kept.names == known_keys({"plugins": ["axolotl.integrations.liger.LigerPlugin"]}).names


# --- attention, and what a colour says nothing of ----------------------------------------------------------------------


@pytest.mark.parametrize("packer", [{"sample_packing": True}, {**PLUGIN, "entry": OURS}], ids=["Axolotl", "ours"])
@pytest.mark.parametrize(
    "attention", [{"flash_attention": True}, {"attn_implementation": "flash_attention_2"}], ids=["old", "new"]
)
def test_attention_that_is_not_here_is_amber(packer: dict[str, Any], attention: dict[str, Any], tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, **packer, **attention)
    assert verdict.colour == "amber", told(verdict)
    (finding,) = verdict.of("packing")
    assert (finding.code, finding.unchecked) == ("not_measured", "packing with attention `flash_attention_2`")
    assert "`flash_attention_2` cannot be measured here; with `sdpa`" in finding.message
    assert verdict_of(tmp_path, **packer, attn_implementation="sdpa").colour == "green"


def test_green_comes_with_the_list_of_what_it_says_nothing_of(tmp_path: Path) -> None:
    whole, part = (run_preflight(read_plan(run_of(tmp_path)), limit=limit) for limit in (None, 10))
    assert whole.colour == part.colour == "green"
    assert "the weights" in whole.not_checked
    assert part.not_checked[0] == "rows beyond the first 10 of each source"
    assert whole.to_dict()["not_checked"] == list(whole.not_checked)


def test_keys_that_the_template_does_not_look_up_are_noted(tmp_path: Path) -> None:
    rows = [{**row, "chat_template_kwargs": {"enable_thinkng": False}} for row in ROWS]
    found = {finding.code: finding for finding in verdict_of(tmp_path, rows=rows).findings}
    assert found["unread_keys"].level == "note"
    assert "chat_template_kwargs.enable_thinkng (in 100)" in found["unread_keys"].message


def test_faults_of_packed_rows_are_counted_by_document(tmp_path: Path) -> None:
    (row,) = _packed_without_stops(3)
    verdict = verdict_of(tmp_path, rows=[row])
    finding = next(f for f in verdict.findings if f.code == "missing_stop")
    assert (finding.count, finding.unit, finding.places) == (3, "document", "3 documents (of rows #0, …)")


def _packed_without_stops(documents: int) -> list[dict[str, Any]]:
    tokenizer = build_tokenizer("qwen", eos="<|im_end|>")
    prompt = tokenizer.apply_chat_template(ROWS[0]["messages"][:1], add_generation_prompt=True)["input_ids"]
    answer = tokenizer("It is 0.<|im_end|>")["input_ids"]
    labels = [-100] * len(prompt) + [*answer[:-1], -100]
    ids = prompt + answer
    return [{"input_ids": ids * documents, "labels": labels * documents, "seq_lengths": [len(ids)] * documents}]


def test_rows_whose_arguments_lack_a_name_or_hold_a_null_are_told_from_whole_ones() -> None:
    def row(**arguments: Any) -> dict[str, Any]:
        return {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}]}

    rows = [row(a=1, b=2), row(a=1, b=None), row(a=1), row(a=0, b=""), {"messages": []}]
    assert null_filled(SimpleNamespace(rows=lambda: rows)) == [1, 2]  # type: ignore[arg-type]
