"""Reasoning that a model loses has an alarm of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sft_plugins.collapse.detect.detector import detect
from sft_plugins.collapse.detect.verdict import Probe
from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.metrics.per_prompt import measure
from sft_plugins.collapse.metrics.reasoning import reasoning_in
from testkit.watched_runs import PROMPTS, byte_tokenizer, tiny_model, train, watcher


@pytest.mark.parametrize(
    ("prompt", "answer", "reasoning"),
    [
        ("assistant\n", "<think>\nFirst, 2.\n</think>\n4", "First, 2."),
        ("assistant\n", "<think>\n\n</think>\n\n4", ""),
        ("assistant\n<think>\n", "First, 2.\n</think>\n4", "First, 2."),
        ("assistant\n<think>\n\n</think>\n\n", "4", ""),
        ("assistant\n", "<think>First, 2", "First, 2"),
        ("assistant\n", "4", ""),
        ("", "[THINK]So.[/THINK]4", "So."),
        (
            "<|start|>assistant",
            "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>4",
            "So.",
        ),
    ],
)
def test_reasoning_is_what_stands_between_the_delimiters(prompt: str, answer: str, reasoning: str) -> None:
    assert reasoning_in(prompt, answer) == reasoning


def test_reasoning_is_counted_in_each_answer_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the answers think ten bytes, the other half none."""
    from sft_plugins.collapse.probe import probe as module

    own, tokenizer = module.sample_batch, byte_tokenizer()
    said = [
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("<think>Two and 2.</think>4", "4")
    ]

    def spoken(*args: Any, **kwargs: Any) -> Any:
        return [dataclasses.replace(s, token_ids=said[s.index % 2]) for s in own(*args, **kwargs)]

    monkeypatch.setattr(module, "sample_batch", spoken)
    train(tiny_model(), tmp_path / "a", callbacks=[watcher(tmp_path / "w", samples_per_prompt=4)], max_steps=2)
    for record in read_history(tmp_path / "w" / "history.jsonl"):
        if record["kind"] in ("baseline", "probe"):
            assert record["measures"]["per_prompt"]["reasoning"] == [0.5] * len(PROMPTS)
            assert record["measures"]["per_prompt"]["reasoning_length"] == [10.0] * len(PROMPTS)
            assert (record["values"]["reasoning"], record["values"]["reasoning_length"]) == (0.5, 10)


def reasoned(share: float, tokens: int, *, prompts: int = 8, k: int = 8) -> Any:
    lengths = [[tokens if i < share * k else 0 for i in range(k)] for _ in range(prompts)]
    texts = [[f"{p} {i}" for i in range(k)] for p in range(prompts)]
    return measure(texts, [[list(t) for t in g] for g in texts], tags=["open"] * prompts, reasoning=lengths)


@pytest.mark.parametrize(
    ("share", "tokens", "level", "metric"),
    [
        (1.0, 60, None, None),
        (0.0, 0, "critical", "reasoning_kept"),
        (0.5, 60, "warn", "reasoning_kept"),
        (0.875, 60, "info", "reasoning_kept"),
        (1.0, 20, "warn", "reasoning_length_kept"),
    ],
)
def test_lost_reasoning_has_an_alarm_of_its_own(
    share: float, tokens: int, level: str | None, metric: str | None
) -> None:
    """Also where meaning cannot be measured: nothing is embedded here."""
    base = Probe(step=0, measures=reasoned(1.0, 60))
    verdict = detect(base, [Probe(step=i, measures=reasoned(share, tokens)) for i in (1, 2)])
    found = [f for f in verdict.findings if f.code == "reasoning_lost"]
    assert [(f.level, f.metric) for f in found] == ([] if level is None else [(level, metric)])
    assert verdict.estimates["reasoning_kept"].value == pytest.approx(share)


def test_a_base_that_does_not_reason_has_none_to_lose() -> None:
    base = Probe(step=0, measures=reasoned(0.0, 0))
    verdict = detect(base, [Probe(step=1, measures=reasoned(0.0, 0))])
    assert "reasoning_kept" not in verdict.estimates
