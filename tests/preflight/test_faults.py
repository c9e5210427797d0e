"""Every failure of the field that shows in data or in a configuration: a small run that carries it, and its code.

`FAULTS` is the list; a faultless run beside each kind shows that nothing is raised without a reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from sft_plugins.errors import AssetError
from sft_plugins.integrations import Overrides, read_plan
from sft_plugins.preflight.run import Verdict, run_preflight
from testkit.conversations import WEATHER_TOOL, assistant, call, system, tool, user
from testkit.leaky import register
from testkit.tokenizers import CHATML, build_tokenizer, tokenizer_for_template

register()  # the models of P1, P5 and P11, whose leaks are planted

GOOD = [
    {"messages": [system("Be brief."), user("What is 2 + 2?"), assistant("It is four.")]},
    {"messages": [user("Hello"), assistant("Hi there."), user("And now?"), assistant("Good night.")]},
]
NO_STOP = CHATML.replace("<|im_end|>", "")
# Reasoning of earlier turns is left out of the history, as Qwen's and DeepSeek's templates do.
FORGETFUL = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")
PREFILLED = CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
TRIMMING = CHATML.replace("m['content']", "m['content'][:12]")
THINKING = [{"messages": [user("a"), assistant("<think>why</think>b"), user("c"), assistant("<think>so</think>d")]}]
TOOLS = [
    {
        "messages": [user("Weather?"), assistant("", tool_calls=[call(arguments)]), tool("21"), assistant("Warm.")],
        "tools": [WEATHER_TOOL],
    }
    for arguments in ({"city": "Paris"}, {"days": 3})
]


def tokenised(kind: str) -> list[dict[str, Any]]:
    """One good row as ids, with a fault planted. The answer is `It is four.<|im_end|>`."""
    tokenizer = build_tokenizer("qwen", eos="<|im_end|>")
    prompt = tokenizer.apply_chat_template(GOOD[0]["messages"][:-1], add_generation_prompt=True)["input_ids"]
    answer = tokenizer("It is four.<|im_end|>")["input_ids"]
    ids, labels = prompt + answer, [-100] * len(prompt) + answer
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    faults: dict[str, dict[str, Any]] = {
        "good": {"input_ids": ids, "labels": labels},
        "whole row": {"input_ids": ids, "labels": list(ids)},
        "no stop": {"input_ids": ids, "labels": [*labels[:-1], -100]},
        "short": {"input_ids": ids, "labels": labels[:-1]},
        "none": {"input_ids": ids, "labels": [-100] * len(ids)},
        "one of two": {"input_ids": ids * 2, "labels": labels + [-100] * len(ids)},
        "mask": {"input_ids": ids, "completion_mask": [int(label != -100) for label in labels]},
        "packed": {"input_ids": ids * 2, "labels": labels * 2, "seq_lengths": [len(ids)] * 2},
        "packed, first label": {"input_ids": ids * 2, "labels": [*labels, bos, *labels[1:]], "seq_lengths": [len(ids)] * 2},
        "packed, lengths": {"input_ids": ids * 2, "labels": labels * 2, "seq_lengths": [len(ids), len(ids) - 1]},
    }  # fmt: skip
    return [faults[kind]]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A run: its rows, its configuration beside model and data, its template, its architecture."""

    failure: str
    code: str
    level: str = "error"
    rows: list[dict[str, Any]] = field(default_factory=lambda: GOOD)
    host: str = "axolotl"
    config: dict[str, Any] = field(default_factory=dict)
    entry: dict[str, Any] = field(default_factory=dict)
    template: str = CHATML
    tokenizer: Callable[[], Any] | None = None
    model_type: str = "llama"


def answers(content: str) -> list[dict[str, Any]]:
    return [*GOOD, {"messages": [user("Say it."), assistant(content)]}]


PAIRS = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in GOOD]
PACKED = {"sample_packing": True, "eval_sample_packing": True}
BOS = "<|begin_of_text|>"

FAULTS = [
    Fault(failure="M1", code="missing_stop", rows=tokenised("no stop")),  # labels masked where the id is the pad id
    Fault(failure="M2", code="prompt_supervised", rows=tokenised("whole row")),
    Fault(
        failure="M3", code="boundary", host="trl", rows=[{"prompt": "The answ", "completion": "er is 4"}],
        tokenizer=lambda: build_tokenizer("merging"),
    ),
    Fault(failure="M5", code="no_generation_markers", host="trl", config={"assistant_only_loss": True}),
    Fault(failure="M6", code="content_lost", rows=answers("A longer answer than that."), template=TRIMMING),
    Fault(failure="M7", code="missing_stop", template=NO_STOP),
    Fault(failure="M7", code="missing_stop", rows=tokenised("no stop")),
    Fault(failure="M7", code="missing_stop", entry={"train_on_eos": "none"}),
    Fault(failure="M8", code="text_after_stop", level="warning", host="trl", rows=PAIRS),
    Fault(failure="M9", code="history_rewrite", rows=THINKING, template=FORGETFUL),
    Fault(failure="M10", code="render_mismatch", template=PREFILLED),
    Fault(failure="M11", code="empty_response", rows=answers("")),
    Fault(failure="M12", code="bad_schema", rows=[*GOOD, {"messages": [user("Hi"), {"role": "asistant", "content": "Hi"}]}]),
    Fault(failure="M12", code="unknown_role", entry={"roles_to_train": ["asistant"]}),
    Fault(failure="M13", code="no_supervised_tokens", rows=tokenised("none")),
    Fault(failure="M13", code="no_supervised_tokens", rows=[*GOOD, {"messages": [user("so " * 90), assistant("x")]}]),
    Fault(failure="M14", code="mask_ignored", host="trl", rows=tokenised("mask")),
    Fault(failure="M15", code="length_mismatch", rows=tokenised("short")),
    Fault(failure="M16", code="unsupervised_turn", rows=tokenised("one of two")),
    Fault(
        failure="M17", code="double_bos", host="trl", rows=[{"text": f"{BOS}Hello there."}],
        tokenizer=lambda: tokenizer_for_template("llama3"),
    ),
    Fault(
        failure="M19", code="null_filled_arguments", level="warning", rows=TOOLS, config={"sequence_len": 1024},
        tokenizer=lambda: tokenizer_for_template("qwen2_5"),
    ),
    Fault(failure="M21", code="special_token_in_content", rows=answers("Sure.<|im_end|>\n<|im_start|>user\nMore")),
    Fault(failure="M22", code="overflow", level="warning", rows=answers("yes " * 90)),
    Fault(failure="P1", code="contamination", config=PACKED, model_type="leaky_attention"),
    Fault(failure="P1", code="contamination", host="trl", config={"packing": True}, model_type="leaky_attention"),
    Fault(failure="P5", code="contamination", host="trl", config={"packing": True}, model_type="leaky_state"),
    Fault(failure="P7", code="first_label", rows=tokenised("packed, first label")),
    Fault(failure="P8", code="boundaries", rows=tokenised("packed, lengths")),
    Fault(failure="P9", code="fragments", host="trl", config={"packing": True, "packing_strategy": "wrapped"}),
    Fault(failure="P10", code="prepacked_rows", host="trl", rows=tokenised("packed")),
    Fault(
        failure="P11", code="eval_contamination", host="trl", config={"packing": True, "eval_strategy": "steps"},
        model_type="leaky_attention",
    ),
    Fault(failure="P15", code="context_parallel", config={**PACKED, "context_parallel_size": 2}),
    Fault(
        failure="P15", code="context_parallel", host="trl",
        config={"packing": True, "parallelism_config": {"cp_size": 2}},
    ),
    Fault(failure="C10", code="fused_loss", level="note", host="trl", config={"use_liger_kernel": True}),
]  # fmt: skip


SHOWN_AS = {"M1": "M7", "P5": "P1"}
"""Failures that show as the same fault as another does."""


def write_run(fault: Fault, folder: Path) -> Path:
    """Model folder, data file and configuration of a run; returns the configuration."""
    model = folder / "model"
    made = (
        fault.tokenizer()
        if fault.tokenizer
        else build_tokenizer("qwen", chat_template=fault.template, eos="<|im_end|>")
    )
    made.save_pretrained(model)
    AutoConfig.for_model(fault.model_type).save_pretrained(model)
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, fault.rows)), encoding="utf-8")
    if fault.host == "trl":
        config = {"model_name_or_path": str(model), "dataset_name": str(data), "max_length": 80, **fault.config}
    else:
        entry = {"path": str(data), "ds_type": "json", "type": "chat_template", **fault.entry}
        config = {"base_model": str(model), "datasets": [entry], "sequence_len": 80, **fault.config}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def verdict_of(fault: Fault, folder: Path, **overrides: Any) -> Verdict:
    return run_preflight(read_plan(write_run(fault, folder), Overrides(**overrides)))


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f.failure}-{f.code}-{i}" for i, f in enumerate(FAULTS)])
def test_each_failure_is_caught_by_its_code(fault: Fault, tmp_path: Path) -> None:
    """M2 … M22, P1 … P15, C10: those that show in data or configuration."""
    verdict = verdict_of(fault, tmp_path)
    found = {finding.code: finding for finding in verdict.findings}
    assert fault.code in found, [f"{f.level} {f.code}: {f.message}" for f in verdict.findings]
    finding = found[fault.code]
    assert finding.level == fault.level
    assert finding.failure == SHOWN_AS.get(fault.failure, fault.failure)
    assert finding.message
    assert finding.remedy or fault.level == "note"
    assert verdict.colour == {"error": "red", "warning": "amber", "note": verdict.colour}[fault.level]


PLUGIN = {"plugins": ["sft_plugins.integrations.axolotl.SFTPlugin"], "sft_plugins": {}}
OURS = {"type": "sft_plugins.integrations.axolotl.strategy"}
FAULTLESS = {
    "Axolotl masks": Fault(failure="", code=""),
    "Axolotl packs": Fault(failure="", code="", config=PACKED),
    "the plug-in masks and packs": Fault(failure="", code="", config=PLUGIN, entry=OURS),
    "the plug-in packs opt": Fault(failure="", code="", config=PLUGIN, entry=OURS, model_type="opt"),
    "the plug-in splits history": Fault(failure="", code="", config=PLUGIN, entry=OURS, rows=THINKING, template=FORGETFUL),
    "rows came tokenised": Fault(failure="", code="", rows=tokenised("good")),
    "TRL reads labels": Fault(failure="", code="", host="trl", rows=tokenised("good"), config={"packing": True}),
    "TRL reads a mask": Fault(failure="", code="", host="trl", rows=tokenised("mask"), config={"completion_only_loss": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTLESS)
def test_nothing_is_raised_against_a_faultless_run(name: str, tmp_path: Path) -> None:
    verdict = verdict_of(FAULTLESS[name], tmp_path)
    assert verdict.colour == "green", [f"{f.level} {f.code}: {f.message}" for f in verdict.findings]
    assert all(finding.level == "note" for finding in verdict.findings)


def test_rows_that_are_to_be_dropped_are_a_warning(tmp_path: Path) -> None:
    settings = {**PLUGIN, "sft_plugins": {"masking": {"errors": "drop"}}}
    verdict = verdict_of(Fault(failure="", code="", config=settings, entry=OURS, rows=answers("")), tmp_path)
    assert [(f.level, f.code, f.count) for f in verdict.of("masking")] == [("warning", "empty_response", 1)]
    assert verdict.colour == "amber"


@pytest.mark.parametrize("code", ["text_after_stop", "prepacked_rows", "contamination", "null_filled_arguments"])
def test_with_our_components_the_fault_is_gone(code: str, tmp_path: Path) -> None:
    fault = next(f for f in FAULTS if f.code == code)
    verdict = verdict_of(fault, tmp_path, components=True)
    assert code not in {finding.code for finding in verdict.findings}
    assert verdict.colour == "green", [f"{f.level} {f.code}: {f.message}" for f in verdict.findings]


def test_our_masking_is_judged_with_the_options_it_will_have(tmp_path: Path) -> None:
    """TRL's arguments have no place for them, an Axolotl YAML has; what is asked for on top of that holds."""
    rows = [
        {
            "messages": [
                {"role": "critic", "content": "Why?"},
                {"role": "assistant", "content": "So.", "reasoning": "Hm."},
            ]
        }
    ]
    asked = {"roles": {"critic": "user"}, "reasoning": "drop"}
    trl = Fault(failure="", code="", host="trl", rows=rows)
    verdict = verdict_of(trl, tmp_path / "without", components=True)
    assert {finding.code for finding in verdict.of("masking")} == {"bad_schema"}
    ours = Fault(
        failure="",
        code="",
        config={**PLUGIN, "sft_plugins": {"masking": {"reasoning": "raise"}}},
        entry=OURS,
        rows=rows,
    )
    for number, fault in enumerate((trl, ours)):
        verdict = verdict_of(fault, tmp_path / str(number), components=True, masking=asked)
        assert verdict.colour == "green", [f"{f.level} {f.code}: {f.message}" for f in verdict.findings]
        assert verdict.entries[0].report.changes == {"reasoning_dropped": 1}
    with pytest.raises(AssetError, match="roles, reasoning say how sft-plugins masks") as caught:
        verdict_of(trl, tmp_path / "alone", masking=asked)
    assert caught.value.code == "bad_option"


def test_cost_is_that_of_the_rows(tmp_path: Path) -> None:
    """Tokens by the masker itself; steps as the trainer counts them."""
    from sft_plugins import PromptMasker

    fault = Fault(
        failure="", code="", host="trl", rows=GOOD * 5, config={"per_device_train_batch_size": 2, "num_train_epochs": 3}
    )
    verdict = verdict_of(fault, tmp_path, devices=2)
    masker = PromptMasker(build_tokenizer("qwen", eos="<|im_end|>"))
    rows = [row for example in GOOD * 5 for row in masker.encode(example)]
    assert verdict.cost is not None
    assert verdict.cost.tokens == sum(len(row.input_ids) for row in rows)
    assert verdict.cost.supervised_tokens == sum(label != -100 for row in rows for label in row.labels)
    assert verdict.cost.steps == 3 * 3  # 10 rows, 4 to a step
