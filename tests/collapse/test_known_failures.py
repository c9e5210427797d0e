"""The rows of `docs/known-failures.md` that concern the callback as a whole: C2–C6, C8, C10, on the plain Trainer.

C1, C6 and C7 as measures stand in `test_entropy.py`; C9 in `test_distributed.py`; TRL in `tests/integrations/trl`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from testkit import watched_runs
from testkit.tokenizers import dump
from testkit.watched_runs import (
    added_records,
    byte_tokenizer,
    fingerprint,
    lora,
    rows,
    tiny_model,
    train,
)

MODELS = {"full": tiny_model, "lora": lambda: lora(tiny_model())}


watcher = partial(watched_runs.watcher, eval_pairs=rows(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_steps": 4},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"eval_strategy": "steps", "eval_steps": 3},
        {"logging_steps": 4},
        {"neftune_noise_alpha": 5.0, "bf16": True},
    ],
    ids=["plain", "accumulation", "checkpointing", "evaluation", "sparse-logs", "neftune-bf16"],
)
@pytest.mark.parametrize("kind", list(MODELS))
def test_the_run_is_the_same_bit_for_bit(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """C2, C3: weights, optimizer state, log history, modes, flags and the random numbers that follow. Dropout is on."""
    bare = fingerprint(train(MODELS[kind](), tmp_path / "a", **changes))
    trainer = train(MODELS[kind](), tmp_path / "b", callbacks=[watcher(tmp_path / "w")], **changes)
    watched = fingerprint(trainer)
    assert len(added_records(trainer)) >= 3, "the callback must have looked"
    assert watched == bare


def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run with the random states not restored differs: the test above is not vacuous."""
    monkeypatch.setattr("sft_plugins._preserve._rng", lambda: lambda: None)
    bare = fingerprint(train(tiny_model(), tmp_path / "a"))
    watched = fingerprint(train(tiny_model(), tmp_path / "b", callbacks=[watcher(tmp_path / "w")]))
    assert watched["weights"] != bare["weights"]


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    """C2: the random state that a checkpoint keeps, and the state after it, are the run's own."""
    prints = []
    for name, callbacks in (("a", []), ("b", [watcher(tmp_path / "w")])):
        train(tiny_model(), tmp_path / name, callbacks=callbacks, save_strategy="steps", save_steps=3)
        again = [watcher(tmp_path / "w")] if callbacks else []
        resumed = train(tiny_model(), tmp_path / name, callbacks=again, resume=str(tmp_path / name / "checkpoint-3"))
        prints.append(fingerprint(resumed))
    assert prints[0] == prints[1]


def test_the_trainers_own_records_are_all_there(tmp_path: Path) -> None:
    """C3: each step logs its loss, also the steps at which the callback logs."""
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watcher(tmp_path / "w", every_steps=1)])
    assert [r["step"] for r in trainer.state.log_history if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in added_records(trainer)] == [0, 1, 2, 3, 4, 5, 6]


def test_frozen_weights_stay_frozen_under_lora(tmp_path: Path) -> None:
    """C4: the optimizer and the adapter's flags survive every use of the base model."""
    model = lora(tiny_model())
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            parameter.requires_grad_(False)
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    train(model, tmp_path / "a", callbacks=[watcher(tmp_path / "w")])
    for name, parameter in model.named_parameters():
        flag, value = before[name]
        assert parameter.requires_grad is flag, name
        assert flag or torch.equal(parameter, value), name


def test_the_tokenizer_is_untouched(tmp_path: Path) -> None:
    """C5."""
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"
    before = dump(tokenizer)
    train(tiny_model(), tmp_path / "a", callbacks=[watcher(tmp_path / "w", tokenizer=tokenizer)], max_steps=2)
    assert dump(tokenizer) == before


def test_what_was_not_measured_is_not_logged(tmp_path: Path) -> None:
    """C6: without held-out pairs there is no held-out loss, not a 0."""
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watcher(tmp_path / "w", eval_pairs=None)], max_steps=2)
    (last,) = [r for r in added_records(trainer) if r["step"] == 2]
    assert "collapse/heldout_loss" not in last
    assert "collapse/gap" not in last
    assert last["collapse/entropy"] > 0


def test_without_an_embedder_there_is_no_semantic_figure_and_it_is_said(tmp_path: Path) -> None:
    """C8: lexical figures are shown and decide nothing."""
    watch = watcher(tmp_path / "w", embedder=None)
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watch], max_steps=2)
    last = added_records(trainer)[-1]
    assert "collapse/distinct_1" in added_records(trainer)[0] or "collapse/unique" in last
    assert not any("diversity" in key or "vendi" in key or "similarity" in key for key in last)
    assert watch.verdict is not None
    assert "no_embedder" in watch.verdict.codes


def test_nothing_hangs_on_the_lm_head(tmp_path: Path) -> None:
    """C10: no hook is left or made; the probe's forward is its own."""
    model = tiny_model()
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(len(model.lm_head._forward_hooks)))
    train(model, tmp_path / "a", callbacks=[watcher(tmp_path / "w")], max_steps=2)
    assert set(calls) == {1}
    assert all(len(m._forward_hooks) + len(m._forward_pre_hooks) == (m is model.lm_head) for m in model.modules())


def test_probe_logits_are_those_of_a_plain_forward() -> None:
    """C10, C7: asked for at supervised positions only, in slices, padded and batched, they are the same numbers."""
    from sft_plugins.collapse.probe import teacher_forcing

    model = tiny_model().eval()
    texts = [
        teacher_forcing.LabelledText(tuple(r["input_ids"][:n]), tuple(r["labels"][:n]))
        for r, n in zip(rows(3), (9, 20, 14), strict=True)
    ]
    with torch.no_grad():
        for size in (2**29, 4 * 261 * 3 * 2):
            bytes_before, teacher_forcing._LOGIT_BYTES = teacher_forcing._LOGIT_BYTES, size
            found = teacher_forcing.judge_rows(model, texts, (0, 1, 2))
            teacher_forcing._LOGIT_BYTES = bytes_before
            for i, row in enumerate(texts):
                logits = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
                expected = [
                    -logits[t, row.labels[t + 1]] for t in range(len(row.labels) - 1) if row.labels[t + 1] != -100
                ]
                assert torch.allclose(found.stats.nll[found.row == i], torch.stack(expected), atol=1e-5)
