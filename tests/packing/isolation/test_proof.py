"""Faults planted in an isolated model: the proof sees each, whatever it is that brings it out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.apply import check_isolation, isolate
from sft_plugins.packing.isolation.backends import varlen
from sft_plugins.packing.isolation.backends.kernels import Rule
from sft_plugins.packing.isolation.frame import current_boundaries
from sft_plugins.packing.isolation.proof import float32, gradients
from sft_plugins.packing.isolation.proof.limits import lowered, windows
from testkit.isolation_oracle import gap, make_documents, run_alone, run_packed
from testkit.tiny_models import build, build_smooth

EOS = 2

States = torch.Tensor
Fault = Callable[[torch.Tensor, States], States]


def running_mean(ids: torch.Tensor, states: States) -> States:
    """A state that goes on from document to document."""
    counts = torch.arange(1, states.shape[1] + 1, dtype=states.dtype)
    return states + 0.04 * states.detach().cumsum(1) / counts[:, None]


def one_token(ids: torch.Tensor, states: States) -> States:
    """The first token of the third document sees the one before it, and nothing else leaks."""
    if (boundaries := current_boundaries()) is None:
        return states
    start = int(boundaries.starts[2])
    leak = torch.zeros_like(states).flatten(0, 1)
    leak[start] = 0.1 * states.flatten(0, 1)[start - 1]
    return states + leak.view_as(states)


def beyond_sixteen_of_the_row(ids: torch.Tensor, states: States) -> States:
    late = (torch.arange(states.shape[1]) >= 16)[None, :, None]
    return states + late.to(states.dtype) * 0.1 * states[:, :1]


def beyond_sixteen_of_the_document(ids: torch.Tensor, states: States) -> States:
    if (boundaries := current_boundaries()) is None:
        return states
    late = (boundaries.position_ids("cpu") >= 16)[..., None]
    return states + late.to(states.dtype) * 0.1 * states[:, :1]


def behind_the_end_of_a_document(ids: torch.Tensor, states: States) -> States:
    """Real rows hold the id that ends a document; nothing leaks where it does not stand."""
    seen = torch.zeros_like(ids).index_put_((ids == EOS).nonzero(as_tuple=True), torch.tensor(1)).cumsum(1)
    return states + (seen > 0)[..., None].to(states.dtype) * 0.1 * states[:, :1]


def second_half(ids: torch.Tensor, states: States) -> States:
    half = states.shape[1] // 2
    return torch.cat([states[:, :half], states[:, half:] + 0.1 * states[:, :half].mean(1, keepdim=True)], dim=1)


def other_rows(ids: torch.Tensor, states: States) -> States:
    return states + 0.1 * (states.mean((0, 1)) - states.mean(1, keepdim=True))


def longest_of_the_row(ids: torch.Tensor, states: States) -> States:
    boundaries = current_boundaries()
    return states * (1 + 1e-3 * (states.shape[1] if boundaries is None else boundaries.max_length))


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: States) -> States:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient + 0.1 * gradient.mean(1, keepdim=True)


def only_backward(ids: torch.Tensor, states: States) -> States:
    return Backward.apply(states)


FORWARD = "moved the logits|other logits packed than alone"
FAULTS: dict[Fault, str] = {
    running_mean: FORWARD,
    one_token: FORWARD,
    beyond_sixteen_of_the_row: FORWARD,
    beyond_sixteen_of_the_document: FORWARD,
    behind_the_end_of_a_document: "other logits packed than alone, in two rows with the ids",
    second_half: FORWARD,
    other_rows: "other logits packed than alone, in two rows",
    longest_of_the_row: FORWARD,
    only_backward: "gradients from the loss of others",
}


def plant(model: torch.nn.Module, fault: Fault) -> None:
    model.model.embed_tokens.register_forward_hook(lambda _, arguments, states: fault(arguments[0], states))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_p24_the_proof_sees_a_planted_fault(fault: Fault, dtype: torch.dtype) -> None:
    """P24: in half precision as in fp32; forward, backward, and where only length, place or an id brings it out."""
    model = build("llama").model.to(dtype)
    isolate(model, backend="varlen")
    plant(model, fault)
    with pytest.raises(ContaminationError, match=FAULTS[fault]) as caught:
        check_isolation(model)
    assert caught.value.code == "contaminated"


def heavy_and_leaking() -> torch.nn.Module:
    """The model of P24: ten times the weights, a leak of 3.8e-2 in fp32 that bf16 took for rounding."""
    model = build("llama").model
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight *= 10
    model.lm_head.register_forward_pre_hook(lambda _, arguments: (running_mean(arguments[0], arguments[0]),))
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("backend", ["auto", "varlen", "unpack"])
def test_p24_a_leak_below_the_rounding_of_half_precision_is_refused(backend: str) -> None:
    """P24: accepted as exact with "0 tokens moved" where what moved was less than a share of the largest logit."""
    with pytest.raises(ContaminationError, match="in float32 arithmetic"):
        isolate(heavy_and_leaking(), backend=backend)


def test_p24_where_float32_cannot_be_had_what_moves_is_set_against_measured_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """P24: and the report of a model without a leak says what was not seen."""

    def fails() -> Any:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr("sft_plugins.packing.isolation.probe.in_float32", fails)
    with pytest.raises(ContaminationError, match="another layout of the same document"):
        isolate(heavy_and_leaking(), backend="varlen")
    report = isolate(build("llama").model.to(torch.bfloat16))
    assert report.backend == "varlen"
    assert any("not seen: what float32 arithmetic would show" in note for note in report.notes)


def test_frequencies_shifted_inside_a_document_are_seen() -> None:
    model = build("llama").model
    isolate(model)
    rotary = model.model.rotary_emb
    inner = rotary.forward

    def shifted(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return inner(x, position_ids + (position_ids > 5) * (current_boundaries() is not None))

    rotary.forward = shifted
    with pytest.raises(ContaminationError, match="other logits packed than alone"):
        check_isolation(model)


def test_p19_a_window_out_of_reach_is_crossed_lower_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """P19: a window of 4,096 tokens that packed rows forget about."""
    model = build("mistral", sliding_window=4096).model
    report = isolate(model)
    assert any("sliding_window = 4096: crossed" in note for note in report.notes)
    assert model.config.sliding_window == 4096
    monkeypatch.setattr(varlen, "_rule_of", lambda *_: Rule())
    with pytest.raises(ContaminationError, match="where sliding_window = 4096 is 7"):
        check_isolation(model)


@pytest.mark.parametrize("backend", ["varlen", "unpack"])
def test_p19_temperatures_by_the_place_in_the_row_follow_the_document(backend: str) -> None:
    """P19: Llama 4 counts from the start of the row; beyond `floor_scale` every later document got another temperature."""
    tiny = build("llama4_text", floor_scale=8, attn_scale=0.5)
    documents = make_documents([30, 3, 18, 9], tiny.vocab_size)
    expected = run_alone(tiny.model, documents)
    isolate(tiny.model, backend=backend)
    found = gap(expected, run_packed(tiny.model, documents))
    assert found.logits <= 1e-5, found
    assert found.gradients <= 1e-4, found


def test_limits_are_the_models_own_again() -> None:
    model = build("llama4_text").model
    before = [getattr(layer.self_attn, "floor_scale", None) for layer in model.model.layers]
    with contextlib.suppress(KeyError), lowered(model, ["floor_scale"]):
        assert model.model.layers[0].self_attn.floor_scale == model.config.floor_scale == 7
        raise KeyError
    assert [getattr(layer.self_attn, "floor_scale", None) for layer in model.model.layers] == before
    assert model.config.floor_scale == 8192


def test_only_limits_out_of_reach_are_lowered() -> None:
    """Documents of the probe reach 64 tokens; a window of 1 is one, no window is none."""
    for own, inside in ((1, 1), (64, 64), (65, 7)):
        model = build("mistral", sliding_window=own).model
        assert windows(model) == {"sliding_window": own}
        with lowered(model, ["sliding_window", "rms_norm_eps"]):
            assert model.config.sliding_window == inside
            assert model.config.rms_norm_eps == 1e-6
    model.config.sliding_window = 0
    assert windows(model) == {}


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_in_float32_is_the_model_in_float32(name: str, dtype: torch.dtype) -> None:
    """Its weights stay in half precision."""
    model = build_smooth(name).model.to(dtype)
    ids = make_documents([9], 96)[0][None]
    with torch.no_grad(), float32.in_float32():
        logits = model(input_ids=ids, use_cache=False).logits
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    expected = model.float()(input_ids=ids, use_cache=False).logits
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_p19_switches_that_scale_by_the_place_are_refused_by_name() -> None:
    """P19: code published with weights may read the place in the row below any length that a probe could try."""
    model = build("llama").model
    model.config.use_logn_attn = True
    with pytest.raises(ContaminationError, match="use_logn_attn") as caught:
        isolate(model)
    assert caught.value.code == "row_dependent"
    model.config.use_logn_attn = False
    assert isolate(model).backend == "varlen"


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (
            LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6]),
            "invocation tokens",
        ),
        (SimpleNamespace(peft_type="PeftType.XLORA"), "a forward of its own"),
    ],
    ids=["aLoRA", "X-LoRA"],
)
def test_p19_adapters_that_look_at_the_row_are_refused(config: Any, what: str) -> None:
    """P19: they work above the causal LM, where a proof of the causal LM does not reach."""
    model = get_peft_model(build("llama").model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.peft_config["other"] = config
    with pytest.raises(ContaminationError, match=what) as caught:
        isolate(model)
    assert caught.value.code == "row_adapter"


def test_a_gradient_of_half_precision_may_be_off_by_its_rounding_and_no_more() -> None:
    eps = torch.finfo(torch.bfloat16).eps
    one = {"w": torch.tensor([1.0, 0.5], dtype=torch.bfloat16), "b": torch.tensor([1.0])}
    rounded = {"w": torch.tensor([1.0 + 2 * eps, 0.5], dtype=torch.bfloat16), "b": torch.tensor([1.0])}
    assert gradients.apart(one, rounded) == (0.0, "")
    wrong = {**one, "w": torch.tensor([1.25, 0.5], dtype=torch.bfloat16)}
    assert gradients.apart(one, wrong) == (pytest.approx(0.25 - 2 * eps), "w")
    full = {**one, "b": torch.tensor([1.0 + 2 * eps])}
    assert gradients.apart(one, full) == (pytest.approx(2 * eps), "b")
