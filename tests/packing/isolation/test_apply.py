"""`isolate`: exact afterwards, proved, survived by whatever a training run does to a model, and undone without a trace."""

from __future__ import annotations

import copy
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import sft_plugins.packing.isolation.apply as isolation
from sft_plugins.errors import ContaminationError, SFTPluginsError
from sft_plugins.packing.isolation.apply import IsolationReport, check_isolation, isolate
from sft_plugins.packing.isolation.backends.varlen import IMPLEMENTATION
from sft_plugins.packing.isolation.boundaries import Boundaries
from sft_plugins.packing.isolation.forward import installed_backend
from testkit.isolation_oracle import Gap, gap, make_documents, make_labels, packed_batch, run_alone, run_packed
from testkit.leaky import LEAKS
from testkit.tiny_models import build

LENGTHS = [5, 9, 1, 17, 3, 9]
# varlen by sdpa · by the model's own eager code, with sinks, windows and experts · unpack
MODELS = ["llama", "gpt_oss", "falcon"]


def through_pickle(model: torch.nn.Module) -> torch.nn.Module:
    try:
        pickle.dumps(build("llama").model)
    except AttributeError:
        pytest.skip("models of this transformers (5.16, with `kernels` installed) cannot be pickled at all")
    return pickle.loads(pickle.dumps(model))


def documents_of(tiny: Any) -> list[torch.Tensor]:
    return make_documents(LENGTHS, tiny.vocab_size)


def assert_exact(alone: Any, packed: Any) -> None:
    measured: Gap = gap(alone, packed)
    assert measured.logits <= 1e-5, measured
    assert measured.gradients <= 1e-4, measured
    assert alone.gradients.keys() == packed.gradients.keys()


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "varlen"),
        ("gpt_oss", "varlen"),
        ("mamba", "unpack"),
        ("leaky_attention", "varlen"),
        ("leaky_state", "unpack"),
    ],
)
def test_auto_takes_the_fastest_backend_that_is_exact(name: str, backend: str) -> None:
    tiny = build(name)
    alone = run_alone(tiny.model, documents_of(tiny))
    report = isolate(tiny.model)
    assert (report.backend, report.model) == (backend, type(tiny.model).__name__)
    assert report.alone_delta <= report.tolerance <= 1e-4
    assert report.leaked == 0
    assert_exact(alone, run_packed(tiny.model, documents_of(tiny)))
    assert check_isolation(tiny.model).backend == backend


@pytest.mark.parametrize("backend", ["varlen", "unpack"])
def test_each_backend_by_name_is_exact(backend: str) -> None:
    tiny = build("gpt_oss")
    alone = run_alone(tiny.model, documents_of(tiny))
    assert isolate(tiny.model, backend=backend).backend == backend
    assert_exact(alone, run_packed(tiny.model, documents_of(tiny)))


def test_native_serves_where_the_models_own_code_isolates() -> None:
    """Without a cache, transformers' own sdpa tells restarting positions apart for Llama, and the probe says so."""
    tiny = build("llama")
    alone = run_alone(tiny.model, documents_of(tiny))
    report = isolate(tiny.model, backend="native")
    assert (report.backend, report.packed_attention) == ("native", "sdpa")
    assert_exact(alone, run_packed(tiny.model, documents_of(tiny)))


@pytest.mark.parametrize(
    ("name", "backend"), [("leaky_attention", "native"), ("leaky_state", "native"), ("leaky_state", "varlen")]
)
def test_a_backend_that_does_not_isolate_this_model_is_refused_with_what_was_measured(name: str, backend: str) -> None:
    tiny = build(name)
    before = set(tiny.model.__dict__)
    with pytest.raises(ContaminationError, match=f"no backend isolates.*{backend}: ") as caught:
        isolate(tiny.model, backend=backend)
    assert caught.value.code == "contaminated"
    assert "auto" in str(caught.value.remedy)
    assert set(tiny.model.__dict__) == before


@pytest.mark.parametrize("name", LEAKS)
def test_the_probe_fails_for_a_model_that_is_not_isolated(name: str) -> None:
    with pytest.raises(ContaminationError, match=r"moved the logits of|other logits packed than alone") as caught:
        check_isolation(build(name).model)
    assert caught.value.code == "contaminated"


def test_the_probe_sees_a_leak_from_one_document_into_one_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes documents 1 and 2 for one; all else is isolated."""
    tiny = build("llama")
    isolate(tiny.model)
    groups, ungroup = Boundaries.groups, Boundaries.ungroup
    monkeypatch.setattr(Boundaries, "groups", lambda self, device: groups(glued(self), device))
    monkeypatch.setattr(Boundaries, "ungroup", lambda self, device: ungroup(glued(self), device))
    with pytest.raises(ContaminationError, match="changing other documents moved"):
        check_isolation(tiny.model)


def glued(boundaries: Boundaries) -> Boundaries:
    first, second, third, *rest = boundaries.lengths.tolist()
    return Boundaries(np.array([first, second + third, *rest]))


def test_the_probe_sees_wrong_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No document sees another, but positions run on through the row: learned positions are another model's."""
    tiny = build("gpt2")
    isolate(tiny.model)
    inner = tiny.model.transformer.wpe.forward
    monkeypatch.setattr(tiny.model.transformer.wpe, "forward", lambda ids: inner(torch.arange(ids.shape[-1])[None]))
    with pytest.raises(ContaminationError, match="other logits packed than alone"):
        check_isolation(tiny.model)


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


def test_the_probe_leaves_everything_as_it_was() -> None:
    """Modes of every module, gradients, buffers, and the generators of Python, NumPy and torch."""
    tiny = build("qwen3_moe")
    model = tiny.model
    model.train()
    model.model.layers[0].eval()
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    modes = {name: module.training for name, module in model.named_modules()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    isolate(model)
    check_isolation(model)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert torch.is_grad_enabled()


def test_training_mode_and_dropout_do_not_disturb_the_proof() -> None:
    tiny = build("llama", attention_dropout=0.5)
    tiny.model.train()
    assert isolate(tiny.model).perturbed_delta == 0
    assert tiny.model.training


def test_the_report_says_what_was_proved() -> None:
    report = isolate(build("gpt_oss").model)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["backend"] == "varlen"
    assert values["documents"] == list(report.documents)
    assert min(report.documents) == 1
    assert max(report.documents) > 2 * 7, "the longest document crosses the window of 7 twice"
    assert "undo" not in "".join(values)
    text = str(report)
    for said in ("GptOssForCausalLM", "float32", "varlen", "eager", IMPLEMENTATION, "0 tokens moved"):
        assert said in text
    with pytest.raises(AttributeError):
        report.backend = "other"  # type: ignore[misc]


def test_a_window_too_long_for_the_probe_is_noted() -> None:
    report = isolate(build("mistral", sliding_window=4096).model)
    assert any("sliding_window = 4096" in note for note in report.notes)


def test_wrappers_are_looked_through() -> None:
    tiny = build("llama")
    assert isolate(torch.compile(tiny.model, backend="eager")).model == "LlamaForCausalLM"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny.model)
        alone = run_alone(tiny.model, documents_of(tiny), gradients=False)
        assert isolate(wrapped).backend == "varlen"
        assert gap(alone, run_packed(wrapped, documents_of(tiny), gradients=False)).logits <= 1e-5
    finally:
        torch.distributed.destroy_process_group()


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, **changes))  # fmt: skip


def zero(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return tiny_llama()


def encoder() -> nn.Module:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    return BertForMaskedLM(BertConfig(**sizes))  # fmt: skip


def encoder_decoder() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=32))


def prompt_tuned() -> nn.Module:
    return get_peft_model(tiny_llama(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (lambda: nn.Linear(2, 2), "not_causal_lm", "Linear is no model with an LM head"),
        (lambda: tiny_llama().model, "not_causal_lm", "LlamaModel"),
        (lambda: "llama", "not_causal_lm", "got str"),
        (encoder_decoder, "not_causal_lm", "encoder-decoder"),
        (encoder, "not_causal", "moves earlier logits"),
        (on_meta, "meta_device", "meta device"),
        (lambda: zero(tiny_llama()), "probe_blind", "do not depend on earlier tokens"),
        (prompt_tuned, "prompt_learning", "PromptTuningConfig"),
        (lambda: nn.DataParallel(tiny_llama()), "data_parallel", "DataParallel"),
    ],
)
def test_what_cannot_be_isolated_is_refused_by_name(make: Any, code: str, says: str) -> None:
    for function in (isolate, check_isolation):
        with pytest.raises(ContaminationError, match=says) as caught:
            function(make())
        assert caught.value.code == code
        assert caught.value.remedy


def test_an_unknown_backend_is_refused_naming_the_known() -> None:
    with pytest.raises(ValueError, match="'auto', 'varlen', 'native', 'unpack'"):
        isolate(tiny_llama(), backend="flash")


def test_a_prompt_adapter_added_later_is_refused_in_the_forward() -> None:
    """Virtual tokens lengthen the row, and PEFT drops its positions: neither keys nor positions pass for ordinary."""
    tiny = build("llama")
    isolate(tiny.model)
    tuned = get_peft_model(tiny.model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    batch = packed_batch(documents_of(tiny))
    for given in (batch, {key: batch[key] for key in ("input_ids", "position_ids")}, {"input_ids": batch["input_ids"]}):
        with pytest.raises(SFTPluginsError) as caught:
            tuned(**given)
        assert caught.value.code == ("boundaries" if "cu_seq_lens_q" in given else "prompt_learning")


def test_prefix_tuning_added_later_is_refused_in_the_forward() -> None:
    tiny = build("llama")
    isolate(tiny.model)
    tuned = get_peft_model(tiny.model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    batch = packed_batch(documents_of(tiny))
    for given in ({key: batch[key] for key in ("input_ids", "position_ids")}, {"input_ids": batch["input_ids"]}):
        with pytest.raises(ContaminationError) as caught:
            tuned(**given)
        assert caught.value.code in ("prompt_learning", "cache_with_boundaries")


def test_candidates_start_with_the_models_own_kernels_where_it_has_them() -> None:
    model = tiny_llama()
    assert [b.name for b in isolation._candidates(model, "auto")] == ["varlen", "unpack", "unpack"]
    model.config._attn_implementation_internal = "flash_attention_2"
    assert [b.name for b in isolation._candidates(model, "auto")] == ["native", "varlen", "unpack", "unpack"]


def test_reports_are_equal_but_for_their_way_back() -> None:
    report = isolate(build("llama").model)
    assert isinstance(report, IsolationReport)
    assert report == IsolationReport(**{**vars(report), "_undo": None})


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
