"""`varlen`: block-diagonal attention equals the model's own attention on each document, under every rule a layer has."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.backends import kernels
from sft_plugins.packing.isolation.backends.kernels import Rule, per_document, varlen_arguments, varlen_supports
from sft_plugins.packing.isolation.backends.varlen import (
    IMPLEMENTATION,
    Varlen,
    block_diagonal_attention,
    block_diagonal_mask,
)
from sft_plugins.packing.isolation.boundaries import Boundaries
from sft_plugins.packing.isolation.forward import install
from testkit.isolation_oracle import gap, make_documents, run_alone, run_packed, spill
from testkit.tiny_models import WINDOW, build

LENGTHS = [5, 9, 1, 17, 3, 9]
# What each stands for: grouped heads · plain · window per layer · window and soft cap · window and sinks, position_ids
# not passed to masks · chunks · unequal head sizes · scores scaled by config · learned positions · multi-query.
MODELS = ["llama", "gpt2", "qwen2", "mistral", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "deepseek_v3", "cohere2",
          "granite", "opt", "gpt_bigcode"]  # fmt: skip


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], rule: Rule) -> torch.Tensor:
    """Softmax over a dense T×T mask that is False between documents: slow, and obviously right."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    mask = torch.zeros(len(document), len(document), dtype=torch.bool)
    for q in range(len(document)):
        for k in range(q + 1):
            mask[q, k] = (
                document[q] == document[k]
                and (rule.window is None or position[q] - position[k] < rule.window)
                and (rule.chunk is None or position[q] // rule.chunk == position[k] // rule.chunk)
            )
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def sdpa(rule: Rule) -> Any:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mask = rule.mask(query.shape[2], key.shape[2], query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend


@pytest.mark.parametrize("rule", [Rule(), Rule(window=1), Rule(window=4), Rule(chunk=4), Rule(window=99)])
@pytest.mark.parametrize("lengths", [[5, 9, 1, 17, 3, 9], [4, 4, 4], [20], [1] * 7])
def test_attention_per_document_equals_a_dense_block_diagonal_mask(rule: Rule, lengths: list[int]) -> None:
    torch.manual_seed(0)
    T = sum(lengths)
    query, key, value = torch.randn(1, 4, T, 8), torch.randn(1, 2, T, 8), torch.randn(1, 2, T, 6)
    out = per_document(query, key, value, boundaries=Boundaries(np.array(lengths)), attend=sdpa(rule))
    torch.testing.assert_close(out, naive(query, key, value, lengths, rule), rtol=1e-5, atol=1e-6)


def test_rows_of_a_batch_are_read_one_after_the_other() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 6, 4) for _ in range(3))
    out = per_document(query, key, value, boundaries=Boundaries(np.array([2, 4, 5, 1]), rows=2), attend=sdpa(Rule()))
    for row, lengths in enumerate([[2, 4], [5, 1]]):
        one = [states[row : row + 1] for states in (query, key, value)]
        torch.testing.assert_close(out[row : row + 1], naive(*one, lengths, Rule()), rtol=1e-5, atol=1e-6)


def test_documents_of_equal_length_share_a_call_and_no_call_is_wider_than_a_document() -> None:
    calls = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(query.shape))
        return value.transpose(1, 2)

    states = torch.randn(1, 2, 503, 4)
    per_document(states, states, states, boundaries=Boundaries(np.array([1] * 500 + [3])), attend=attend)
    assert calls == [(500, 2, 1, 4), (1, 2, 3, 4)]


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_alone_through_varlen(name: str) -> None:
    """P6: each layer keeps its own rule inside its document."""
    tiny = build(name)
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents)
    without = run_packed(tiny.model, documents)
    install(tiny.model, Varlen())
    measured = gap(alone, run_packed(tiny.model, documents))
    assert measured.logits <= 1e-5, measured
    assert measured.gradients <= 1e-4, measured
    assert spill(tiny.model, documents, 1) <= 1e-6
    assert gap(alone, without).logits > 1e-2, "the test could not fail"


def test_the_layers_rule_is_kept_where_documents_straddle_it() -> None:
    """Lengths one below, at and above a window (and twice it) are where an off-by-one would show."""
    for name in ("mistral", "llama4_text"):
        tiny = build(name)
        documents = make_documents([WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1], tiny.vocab_size)
        alone = run_alone(tiny.model, documents, gradients=False)
        install(tiny.model, Varlen())
        assert gap(alone, run_packed(tiny.model, documents, gradients=False)).logits <= 1e-5


def test_model_code_that_uses_the_ticket_as_a_mask_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention code of a model's own adds the mask to its scores (falcon's did): NaN, never a silent leak."""
    tiny = build("llama")
    for layer in tiny.model.model.layers:
        own, projected = layer.self_attn.forward, layer.self_attn.o_proj

        def forward(*args: Any, own: Any = own, projected: Any = projected, **kwargs: Any) -> Any:
            ticket = kwargs["attention_mask"]
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return projected(states + ticket.float().mean()), None

        monkeypatch.setattr(layer.self_attn, "forward", forward)
    install(tiny.model, Varlen())
    logits = run_packed(tiny.model, make_documents(LENGTHS, tiny.vocab_size), gradients=False).logits
    assert all(bool(one.isnan().all()) for one in logits)


def test_dropout_acts_on_attention_weights_in_training() -> None:
    tiny = build("llama", attention_dropout=0.5)
    install(tiny.model, Varlen())
    documents = make_documents(LENGTHS, tiny.vocab_size)

    def logits() -> torch.Tensor:
        return torch.cat(run_packed(tiny.model, documents, gradients=False).logits)

    assert torch.equal(logits(), logits())
    tiny.model.train()
    assert not torch.allclose(logits(), logits(), atol=1e-3)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Boundaries:
    """As if a packed forward were in progress, of a model whose own attention is sdpa."""
    boundaries = Boundaries(np.array([2, 4, 3]))
    boundaries.scratch["own"] = "sdpa"
    monkeypatch.setattr("sft_plugins.packing.isolation.backends.varlen.current_boundaries", lambda: boundaries)
    return boundaries


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attention_mask": torch.zeros(1, 1, 9, 9)}, "a mask of its own"),
        ({"attention_mask": None, "is_causal": False}, "not causal"),
        ({"attention_mask": None, "position_bias": torch.zeros(1, 2, 9, 9)}, "position_bias"),
        ({"attention_mask": None, "key": torch.randn(1, 2, 12, 4)}, "not within the 9 tokens"),
    ],
)
def test_what_cannot_be_cut_into_documents_is_refused(inside: Boundaries, arguments: dict[str, Any], says: str) -> None:
    states = {name: torch.randn(1, 2, 9, 4) for name in ("query", "key", "value")}
    with pytest.raises(ContaminationError, match=says) as caught:
        block_diagonal_attention(torch.nn.Module(), **{**states, **arguments})
    assert caught.value.code == "unsupported_attention"


@pytest.mark.parametrize(
    "overlaid",
    [
        {"use_vmap": True},
        {"attention_mask": torch.tensor([[True] * 8 + [False]])},
        {"mask_function": None},
        {"kv_length": 10},
    ],
    ids=lambda overlaid: next(iter(overlaid)),
)
def test_a_mask_that_says_more_than_causal_is_refused(inside: Boundaries, overlaid: dict[str, Any]) -> None:
    """Any one sign of it is enough; a mask of the model's own that hides nothing is none."""
    causal = {"q_length": 9, "kv_length": 9, "mask_function": lambda _batch, _head, q, kv: kv <= q}
    for hides_nothing in (None, torch.ones(1, 9, dtype=torch.bool)):
        ticket = block_diagonal_mask(**causal, attention_mask=hides_nothing)
        assert inside.scratch["tickets"][ticket.data_ptr()][0] == Rule()
    with pytest.raises(ContaminationError, match="overlays its causal mask") as caught:
        block_diagonal_mask(**{**causal, **overlaid})
    assert caught.value.code == "unsupported_attention"


def test_block_diagonal_attention_outside_a_packed_forward_is_refused() -> None:
    states = torch.randn(1, 2, 9, 4)
    with pytest.raises(ContaminationError, match="outside a packed forward"):
        block_diagonal_attention(torch.nn.Module(), states, states, states, None)


def test_the_config_names_the_models_own_attention_but_inside_a_packed_forward() -> None:
    tiny = build("llama")
    install(tiny.model, Varlen())
    own, seen = tiny.model.config._attn_implementation, []
    tiny.model.model.layers[0].register_forward_hook(lambda *_: seen.append(tiny.model.config._attn_implementation))
    run_packed(tiny.model, make_documents(LENGTHS, tiny.vocab_size), gradients=False)
    tiny.model(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen == [IMPLEMENTATION, own]
    assert tiny.model.config._attn_implementation == own
    assert IMPLEMENTATION in AttentionInterface._global_mapping


def half(heads: int, size: int = 16, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(1, heads, 9, size).to(dtype)


@pytest.fixture
def kernel_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch had its variable-length kernel for the CPU, so that the choice of it can be looked at here."""
    monkeypatch.setattr(kernels, "KERNEL_DEVICES", frozenset({"cpu"}))


@pytest.mark.parametrize(
    ("window", "expected"), [(None, (-1, 0)), (3, (2, 0)), (1, (0, 0)), (4, (-1, 0)), (99, (-1, 0))]
)
def test_arguments_of_the_cuda_kernel(
    window: int | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`window` counts the query's own token, the kernel's left window does not; longer than any document is none."""
    monkeypatch.setattr(kernels, "_varlen_parameters", lambda: frozenset({"window_size", "enable_gqa"}))
    query, key, value = half(4), half(2), half(2)
    boundaries = Boundaries(np.array([2, 4, 3]))
    arguments = varlen_arguments(query, key, value, boundaries=boundaries, rule=Rule(window=window), scale=0.3)
    assert arguments["window_size"] == expected
    assert arguments["query"].shape == (9, 4, 16)
    assert arguments["key"].shape == arguments["value"].shape == (9, 2, 16)
    assert arguments["cu_seq_q"].tolist() == arguments["cu_seq_k"].tolist() == [0, 2, 6, 9]
    assert arguments["cu_seq_q"].dtype == torch.int32
    assert (arguments["max_q"], arguments["max_k"], arguments["scale"]) == (4, 4, 0.3)
    assert arguments["enable_gqa"] is True
    assert torch.equal(arguments["query"][3], query[0, :, 3])


def test_key_heads_are_repeated_for_a_kernel_that_takes_no_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_varlen_parameters", lambda: frozenset({"window_size"}))
    key, value = half(2), half(2)
    arguments = varlen_arguments(half(4), key, value, boundaries=Boundaries(np.array([9])), rule=Rule())
    for name, states in (("key", key), ("value", value)):
        assert arguments[name].shape == (9, 4, 16)
        for head in range(4):  # queries 0 and 1 read the first group, 2 and 3 the second
            assert torch.equal(arguments[name][:, head], states[0, head // 2])
    assert "enable_gqa" not in arguments


@pytest.mark.parametrize(
    ("change", "supported"),
    [
        ({}, True),
        ({"rule": Rule(window=3)}, True),
        ({"rule": Rule(chunk=4)}, True),  # no document is longer than a chunk
        ({"rule": Rule(chunk=3)}, False),
        ({"dropout": 0.1}, False),
        ({"query": half(4, dtype=torch.float32)}, False),
        ({"query": half(4, size=24), "key": half(2, size=24)}, False),  # MLA: value heads of another size
        ({"query": half(4, 264), "key": half(2, 264), "value": half(2, 264)}, False),
        ({"query": half(4, 12), "key": half(2, 12), "value": half(2, 12)}, False),
    ],
)
@pytest.mark.usefixtures("kernel_here")
def test_the_cuda_kernel_is_taken_only_where_it_computes_the_same(change: dict[str, Any], supported: bool) -> None:
    given = {"query": half(4), "key": half(2), "value": half(2), "rule": Rule(), "longest": 4, "dropout": 0.0, **change}
    assert varlen_supports(**given) is supported


@pytest.mark.parametrize(
    ("special", "used"), [({}, True), ({"s_aux": torch.zeros(4)}, False), ({"softcap": 30.0}, False)]
)
@pytest.mark.usefixtures("kernel_here")
def test_sinks_and_soft_caps_never_reach_the_cuda_kernel(
    inside: Boundaries, monkeypatch: pytest.MonkeyPatch, special: dict[str, Any], used: bool
) -> None:
    inside.scratch["own"] = "flexible"
    calls = []
    monkeypatch.setattr(
        "sft_plugins.packing.isolation.backends.varlen.varlen", lambda *a, **k: calls.append(k) or torch.zeros(1)
    )
    module = build("gpt_oss").model.model.layers[0].self_attn
    query, key, value = half(4), half(2), half(2)
    eager = sys.modules[type(module).__module__]
    monkeypatch.setattr(
        eager, "eager_attention_forward", lambda module, q, k, v, mask, **kwargs: (v.transpose(1, 2), None)
    )
    block_diagonal_attention(module, query, key, value, None, scaling=0.25, **special)
    assert bool(calls) is used


def test_half_precision_under_autocast_is_cast_before_the_kernel_is_chosen() -> None:
    """Autocast knows torch's own attention, but no custom kernel: q in fp32 (a norm on it) would miss it."""
    from sft_plugins.packing.isolation.backends.varlen import _as_autocast

    states = (torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4).bfloat16())
    assert [state.dtype for state in _as_autocast(*states)] == [torch.float32, torch.bfloat16]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {state.dtype for state in _as_autocast(*states)} == {torch.bfloat16}


@pytest.mark.usefixtures("kernel_here")
def test_a_torch_or_a_device_without_the_kernel_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"query": half(4), "key": half(2), "value": half(2), "rule": Rule(), "longest": 4, "dropout": 0.0}
    assert varlen_supports(**given) is True
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_varlen_parameters", frozenset)
        assert varlen_supports(**given) is False
    monkeypatch.undo()
    assert varlen_supports(**given) is False
