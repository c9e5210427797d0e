"""The callback as a guest: it starts only when it can see, and never ends a training after step 0."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_plugins.collapse import callback as module
from sft_plugins.collapse import monitor
from sft_plugins.collapse.callback import ModeCollapseCallback
from sft_plugins.collapse.history import History, read_history
from sft_plugins.collapse.probe import figures, probe, teacher_forcing
from sft_plugins.errors import CollapseError
from sft_plugins.masking import PromptMasker
from testkit import watched_runs
from testkit.watched_runs import (
    added_records,
    byte_tokenizer,
    fingerprint,
    rows,
    tiny_model,
    train,
)

watcher = partial(watched_runs.watcher, eval_pairs=rows(3))


# --- before step 0: a broken watcher stops the start -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"prompts": []}, "no_prompts", "no prompts"),
        ({"samples_per_prompt": 1}, "bad_option", "one answer per prompt has no variety"),
        ({"samples_per_prompt": True}, "bad_option", "expected an integer"),
        ({"every_steps": 0}, "bad_option", "every_steps is 0"),
        ({"budget": 3}, "bad_option", "budget is 3"),
        ({"on_collapse": "halt"}, "bad_option", "expected 'warn', 'stop', or a callable"),
        ({"tokenizer": "gpt2"}, "bad_option", "not a tokenizer"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(changes: dict, code: str, words: str) -> None:
    with pytest.raises(CollapseError, match=words) as caught:
        watcher(None, **changes)
    assert caught.value.code == code
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"prompts": ["A?", "B" * 400]}, "prompt_too_long", "exceed the model"),
        ({"eval_pairs": []}, "no_eval_pairs", "empty"),
        ({"eval_pairs": [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]}, "no_supervised_tokens", "nothing to judge"),
        ({"eval_pairs": [{"input_ids": [5, 6, 7], "labels": [5, 6]}]}, "eval_pair", "3 ids but 2 labels"),
        ({"eval_pairs": {"input_ids": [5, 6], "labels": [-100, 6]}}, "eval_pair", "got str"),
        ({"eval_pairs": [{"messages": []}]}, "eval_pair", "cannot be masked"),
        (
            {"eval_pairs": [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "seq_lengths": [2, 2]}]},
            "eval_pair",
            "packed",
        ),
        ({"baseline": "no/such.npz"}, "baseline_missing", "no baseline file"),
        ({"embedder": "no/such-encoder"}, "embedder", "cannot be loaded"),
        ({"embedder": 7}, "bad_option", "expected .auto., .model., a sentence-transformers model by name or folder"),
        ({"embedder": "model"}, "embedder", "LoRA"),
        ({"embedder": lambda texts: [1.0]}, "embedder", "gave shape"),
        ({"embedder": lambda texts: 1 / 0}, "setup", "ZeroDivisionError"),
    ],
)
def test_training_never_starts_with_a_broken_watcher(tmp_path: Path, changes: dict, code: str, words: str) -> None:
    steps: list[int] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    with pytest.raises(CollapseError, match=words) as caught:
        train(tiny_model(), tmp_path, callbacks=[watcher(tmp_path / "w", **changes), Steps()], max_steps=1)
    assert caught.value.code == code
    assert caught.value.remedy
    assert steps == []


def test_a_model_with_nan_logits_is_refused_before_step_0(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[9] = float("nan")
    with pytest.raises(CollapseError, match="NaN or infinite"):
        train(model, tmp_path, callbacks=[watcher(tmp_path / "w")], max_steps=1)


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_weights_are_refused_before_step_0(tmp_path: Path) -> None:
    """FSDP2 leaves parts of weights where the watch reads whole ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(tiny_model(), mesh=init_device_mesh("cpu", (1,)))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(CollapseError, match="divided among processes") as caught:
        watcher(tmp_path / "w").on_train_begin(args, TrainerState(max_steps=4), TrainerControl(), model=model)
    assert caught.value.code == "sharded"


# --- after step 0: nothing ends the training -------------------------------------------------------------------------

STAGES = {
    "reading": (probe, "judge_rows"),
    "sampling": (probe, "sample_batch"),
    "embedding": (probe.Meaning, "embed"),
    "measuring": (probe, "measure"),
    "judging": (monitor.Detector, "add"),
    "figures": (figures, "figures"),
    "writing": (History, "append"),
    "logging": (module, "log_through"),
}


@pytest.mark.parametrize("stage", list(STAGES))
def test_training_goes_on_unchanged_when_a_probe_fails(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """State is restored after an exception at each stage, also of `requires_grad`, modes and random numbers."""
    bare = fingerprint(train(tiny_model(), tmp_path / "a", max_steps=3))
    owner, name = STAGES[stage]
    own = getattr(owner, name)
    failed: list[str] = []

    class Break(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            def broken(*args: Any, **kwargs: Any) -> Any:
                if stage == "writing" and args[1] == "problem":
                    return own(*args, **kwargs)
                if stage in ("reading", "sampling", "embedding", "measuring"):
                    torch.manual_seed(123)  # inside a probe, so it must not be felt outside
                failed.append(stage)
                raise RuntimeError("broken on purpose")

            monkeypatch.setattr(owner, name, broken)

    trainer = train(tiny_model(), tmp_path / "b", callbacks=[Break(), watcher(tmp_path / "w")], max_steps=3)
    monkeypatch.undo()
    assert failed, "the stage must have been reached"
    assert trainer.state.global_step == 3
    assert fingerprint(trainer) == bare
    assert "training goes on" in capsys.readouterr().out


def test_nan_in_the_middle_of_training_is_told_and_survived(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    model.lm_head.weight[9] = float("nan")

    watch = watcher(tmp_path / "w", eval_pairs=None)
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[Spoil(), watch], max_steps=4)
    assert trainer.state.global_step == 4
    assert "logits are NaN or infinite while it answers" in capsys.readouterr().out
    problems = [r for r in read_history(tmp_path / "w" / "history.jsonl") if r["kind"] == "problem"]
    assert [p["step"] for p in problems] == [4]


def test_memory_that_runs_out_makes_batches_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, own, widths = watcher(tmp_path / "w"), probe.sample_batch, []

    def tight(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        widths.append(len(batch.rows))
        if watch._active and len(batch.rows) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(model, batch, *args, **kwargs)

    monkeypatch.setattr(probe, "sample_batch", tight)
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watch], max_steps=2)
    assert max(widths) > 5 >= widths[-1]
    assert [r["step"] for r in added_records(trainer)] == [0, 2]


@pytest.mark.parametrize("kind", ["file in the way", "read-only"])
def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "w"
    if kind == "read-only":
        own = Path.touch

        def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
            if target in self.parents:
                raise PermissionError(f"[Errno 13] Permission denied: '{self}'")
            own(self, *args, **kwargs)

        monkeypatch.setattr(Path, "touch", refuse)
    else:
        target.write_text("not a folder")
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watcher(target)], max_steps=4)
    assert trainer.state.global_step == 4
    assert capsys.readouterr().out.count("cannot write to") == 1
    assert len(added_records(trainer)) == 3, "figures still reach the loggers"


def test_a_tokenizer_without_chat_template_gives_plain_prompts_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    watch = watcher(tmp_path / "w", tokenizer=byte_tokenizer(chat_template=None, pad=False))
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watch], max_steps=2)
    assert capsys.readouterr().out.count("no chat template") == 1
    assert len(added_records(trainer)) == 2


def test_a_host_that_hides_its_trainer_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(module, "find_trainer", lambda _: None)
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watcher(tmp_path / "w")], max_steps=4)
    assert added_records(trainer) == []
    assert capsys.readouterr().out.count("Call callback.attach(trainer)") == 1
    probes = [r for r in read_history(tmp_path / "w" / "history.jsonl") if r["kind"] == "probe"]
    assert [p["step"] for p in probes] == [2, 4]


# --- what it does with a collapse --------------------------------------------------------------------------------------


def collapsing(watch: ModeCollapseCallback, folder: Path, *, steps: int = 6) -> Any:
    """Train while the model turns, after step 1, into one that answers one sentence to everything."""
    sentence = byte_tokenizer()("I cannot.")["input_ids"] + [2]

    class Collapse(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
            own = probe.sample_batch

            def answer(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
                made = own(model, batch, *args, **kwargs)
                return [type(s)(s.prompt, s.index, tuple(sentence), "I cannot.", False, s.seed) for s in made]

            if state.global_step == 1:
                self.patch = pytest.MonkeyPatch()
                self.patch.setattr(probe, "sample_batch", answer)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.patch.undo()

    return train(tiny_model(), folder, callbacks=[watch, Collapse()], max_steps=steps)


def test_one_sentence_to_everything_is_critical_and_stops_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    watch = watcher(tmp_path / "w", on_collapse="stop", every_steps=1)
    trainer = collapsing(watch, tmp_path / "a")
    assert watch.verdict is not None
    assert watch.verdict.level == "critical"
    assert {"narrowing"} <= set(watch.verdict.codes)
    assert trainer.state.global_step == 3, "two looks in a row confirm it, at steps 2 and 3"
    out = capsys.readouterr().out
    assert "CRITICAL narrowing" in out
    assert "training stops at step 3" in out


def test_warn_says_it_and_trains_on_and_a_callable_is_given_the_verdict(tmp_path: Path) -> None:
    seen: list[str] = []
    watch = watcher(tmp_path / "w", every_steps=1, on_collapse=lambda verdict: seen.append(verdict.level) or 1 / 0)
    trainer = collapsing(watch, tmp_path / "a", steps=4)
    assert trainer.state.global_step == 4, "neither the alarm nor an error in the user's function ends training"
    assert seen == ["critical", "critical"]


def test_eval_pairs_of_text_are_masked_by_the_masker(tmp_path: Path) -> None:
    pairs = [{"prompt": "Hi?", "response": "Ho."}]
    encoded = teacher_forcing.eval_rows(pairs, PromptMasker(byte_tokenizer()), context=256, limit=4)
    supervised = [label for label in encoded[0].labels if label != -100]
    assert byte_tokenizer().decode(supervised, skip_special_tokens=True).strip() == "Ho."


def test_the_options_table_gives_the_defaults_that_the_callback_has() -> None:
    parameters = inspect.signature(ModeCollapseCallback.__init__).parameters
    page = Path(__file__).parents[2] / "docs" / "collapse.md"
    table = page.read_text(encoding="utf-8").split("| option | default | |")[1].split("\n\n")[0]
    told: dict[str, object] = {}
    for names, defaults, *_ in (line.strip("|").split("|") for line in table.splitlines()[2:]):
        for name, default in zip(re.findall(r"`(\w+)`", names), defaults.replace("`", "").split(", "), strict=False):
            with suppress(ValueError, SyntaxError):  # words: "32 open", "<output_dir>/collapse"
                told[name] = ast.literal_eval(default.strip())
    assert set(told) >= {
        "budget",
        "max_eval_pairs",
        "samples_per_prompt",
        "max_new_tokens",
        "seed",
        "report",
        "baseline",
    }
    assert told == {name: parameters[name].default for name in told}


@pytest.mark.parametrize(
    ("active", "logs", "told"),
    [
        (True, {"loss": 1.0}, True),
        (True, {"collapse/entropy": 1.0}, False),
        (True, None, False),
        (False, {"loss": 1.0}, False),
    ],
)
def test_what_the_trainer_logs_is_noted_and_nothing_of_ours(active: bool, logs: Any, told: bool) -> None:
    noted: list[Any] = []
    session = SimpleNamespace(
        schedule=SimpleNamespace(paying=lambda tier: nullcontext()),
        guarded=lambda what, state, work: work(),
        monitor=SimpleNamespace(trainer_logged=lambda step, values: noted.append((step, values))),
    )
    watch = SimpleNamespace(_session=session, _active=active)
    ModeCollapseCallback.on_log(watch, None, TrainerState(global_step=3), None, logs=logs)  # type: ignore[arg-type]
    assert noted == ([(3, logs)] if told else [])
