"""`isolate` survives whatever a training run does to a model, and is undone without a trace."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.apply import check_isolation, isolate
from sft_plugins.packing.isolation.backends.varlen import IMPLEMENTATION
from sft_plugins.packing.isolation.forward import installed_backend
from testkit.isolated import assert_exact, documents_of, through_pickle, zero
from testkit.isolation_oracle import gap, make_documents, make_labels, packed_batch, run_alone, run_packed
from testkit.tiny_models import build

# varlen by sdpa · by the model's own eager code, with sinks, windows and experts · unpack
MODELS = ["llama", "gpt_oss", "falcon"]


@pytest.mark.parametrize("name", MODELS)
def test_lora_before_or_after_isolate(name: str) -> None:
    tiny = build(name)
    target = "all-linear"
    config = LoraConfig(r=4, target_modules=target, task_type=TaskType.CAUSAL_LM, init_lora_weights=False)
    torch.manual_seed(0)
    before = get_peft_model(copy.deepcopy(tiny.model), config)
    alone = run_alone(before, documents_of(tiny))
    assert len(alone.gradients) >= 4
    isolate(before)
    assert_exact(alone, run_packed(before, documents_of(tiny)))

    isolate(tiny.model)
    torch.manual_seed(0)
    after = get_peft_model(tiny.model, config)
    assert_exact(alone, run_packed(after, documents_of(tiny)))
    assert check_isolation(after).leaked == 0


def test_dora() -> None:
    tiny = build("llama")
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type=TaskType.CAUSAL_LM)
    peft = get_peft_model(tiny.model, config)
    alone = run_alone(peft, documents_of(tiny))
    isolate(peft)
    assert_exact(alone, run_packed(peft, documents_of(tiny)))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", [*MODELS, "gemma2"])
def test_gradient_checkpointing_recomputes_inside_the_same_boundaries(name: str, reentrant: bool) -> None:
    """Two packed rows run forward before either runs backward: boundaries are those of the row, not of the last one."""
    tiny = build(name)
    model, documents = tiny.model, documents_of(tiny)
    others = make_documents([4, 11, 2, 6], tiny.vocab_size, seed=1)
    first, second = run_alone(model, documents), run_alone(model, others)
    expected = {key: first.gradients[key] + second.gradients[key] for key in first.gradients}
    isolate(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    recomputed = []
    attention = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    attention.register_forward_hook(lambda *_: recomputed.append(torch.is_grad_enabled()))
    model.zero_grad(set_to_none=True)
    losses = [packed_loss(model, rows) for rows in (documents, others)]
    forwards = len(recomputed)
    sum(losses).backward()
    assert len(recomputed) > forwards, "nothing was recomputed: the test would prove nothing"
    for key, parameter in model.named_parameters():
        if key in expected:
            difference = (parameter.grad - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1e-6)
            assert difference <= 1e-4, (key, float(difference))


def packed_loss(model: nn.Module, documents: list[torch.Tensor]) -> torch.Tensor:
    logits = model(**packed_batch(documents)).logits[0]
    labels = torch.cat(make_labels(documents))
    starts = torch.tensor([len(d) for d in documents]).cumsum(0)[:-1]
    labels[0] = labels[starts] = -100
    return nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")


def test_the_models_own_loss_is_that_of_its_documents() -> None:
    """P7: with `labels` in the batch and the first of each document masked, no token is predicted from another's."""
    tiny = build("llama")
    documents = documents_of(tiny)
    alone = run_alone(tiny.model, documents)
    isolate(tiny.model)
    batch = packed_batch(documents, labels=True)
    count = int((batch["labels"] != -100).sum())
    loss = tiny.model(**batch).loss * count
    assert float(loss) == pytest.approx(alone.loss, rel=1e-5)


@pytest.mark.slow
def test_torch_compile_of_the_model() -> None:
    tiny = build("llama")
    documents = documents_of(tiny)
    alone = run_alone(tiny.model, documents)
    isolate(tiny.model)
    compiled = torch.compile(tiny.model, backend="aot_eager")
    assert gap(alone, run_packed(compiled, documents, gradients=False)).logits <= 1e-5
    tiny.model.compile(backend="aot_eager")
    assert_exact(alone, run_packed(tiny.model, documents))
    assert check_isolation(compiled).backend == "varlen"


@pytest.mark.parametrize("name", MODELS)
def test_bf16_autocast(name: str) -> None:
    """Held to the error of the same documents alone under the same autocast, against fp32."""
    tiny = build(name)
    documents = documents_of(tiny)
    exact = run_alone(tiny.model, documents, gradients=False)
    isolate(tiny.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = run_alone(tiny.model, documents, gradients=False)
        packed = run_packed(tiny.model, documents, gradients=False)
    error = gap(exact, alone).logits
    assert 1e-4 < error < 0.3
    assert gap(exact, packed).logits <= 1.5 * error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_proved_too(dtype: torch.dtype) -> None:
    tiny = build("llama")
    report = isolate(tiny.model.to(dtype))
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert report.alone_delta <= report.tolerance <= 32 * torch.finfo(dtype).eps
    assert report.perturbed_delta == 0
    report.undo()
    with pytest.raises(ContaminationError):
        check_isolation(tiny.model)


@pytest.mark.parametrize("name", MODELS)
def test_generation_and_padded_evaluation_are_as_before(name: str) -> None:
    tiny = build(name)
    prompts = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])
    mask = (prompts != 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def behaviour() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            padded = tiny.model(input_ids=prompts, attention_mask=mask).logits
            plain = tiny.model(input_ids=prompts[1:]).logits
        return tiny.model.generate(prompts, **options), padded, plain

    before = behaviour()
    isolate(tiny.model)
    run_packed(tiny.model, documents_of(tiny), gradients=False)
    for ours, theirs in zip(behaviour(), before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_is_isolated_on_its_own(name: str, copied: Any) -> None:
    tiny = build(name)
    report = isolate(tiny.model)
    twin = copied(tiny.model)
    report.undo()
    assert check_isolation(twin).backend == report.backend
    with pytest.raises(ContaminationError):
        check_isolation(tiny.model)


def test_a_saved_checkpoint_loads_where_this_package_is_not(tmp_path: Path) -> None:
    tiny = build("llama")
    isolate(tiny.model)
    run_packed(tiny.model, documents_of(tiny), gradients=False)
    tiny.model.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    script = f"""
import sys
sys.modules["sft_plugins"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
import torch
print(model.config._attn_implementation, float(model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum()))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "sdpa"
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=torch.tensor([[5, 6, 7]])).logits.sum()
    assert float(out[1]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_undo_leaves_the_model_as_it_was(name: str) -> None:
    tiny = build(name)
    model = tiny.model

    def state() -> Any:
        modules = {
            key: (sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
            for key, m in model.named_modules()
        }
        return modules, sorted(model.state_dict()), json.dumps(model.config.to_dict(), default=str), model.forward

    before = state()
    with isolate(model) as report:
        assert sorted(model.state_dict()) == before[1]
        run_packed(model, documents_of(tiny))
        assert "forward" in model.__dict__
    assert state() == before
    report.undo()  # a second time does nothing
    assert state() == before


def test_isolating_twice_is_isolating_once_and_another_backend_takes_over() -> None:
    tiny = build("llama")
    first = isolate(tiny.model)
    second = isolate(tiny.model, backend="unpack")
    assert [first.backend, second.backend, check_isolation(tiny.model).backend] == ["varlen", "unpack", "unpack"]
    first.undo()  # no longer in charge
    assert check_isolation(tiny.model).backend == "unpack"
    second.undo()
    assert installed_backend(tiny.model) is None
    assert "forward" not in tiny.model.__dict__


def test_a_failed_isolate_keeps_what_was_installed() -> None:
    tiny = build("falcon")
    isolate(tiny.model)
    with pytest.raises(ContaminationError):
        isolate(tiny.model, backend="varlen")
    assert check_isolation(tiny.model).backend == "unpack"


def test_accelerates_mixed_precision_wrapper_comes_and_goes() -> None:
    """accelerate wraps `forward` for autocast, and on unwrapping binds what it finds inside to the model once more."""
    from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel

    tiny = build("llama")
    alone = run_alone(tiny.model, documents_of(tiny), gradients=False)
    isolate(tiny.model)
    tiny.model._original_forward = tiny.model.forward
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)(tiny.model.forward.__func__)
    tiny.model.forward = MethodType(convert_outputs_to_fp32(autocast), tiny.model)
    wrapped = run_packed(tiny.model, documents_of(tiny), gradients=False)
    assert 1e-4 < gap(alone, wrapped).logits < 0.3
    extract_model_from_parallel(tiny.model, keep_fp32_wrapper=False)
    assert gap(alone, run_packed(tiny.model, documents_of(tiny), gradients=False)).logits <= 1e-5
    twin = copy.deepcopy(tiny.model)
    zero(tiny.model)
    assert gap(alone, run_packed(twin, documents_of(tiny), gradients=False)).logits <= 1e-5
