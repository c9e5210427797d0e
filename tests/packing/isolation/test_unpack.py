"""`unpack`, and whatever `isolate` chooses, equal every document run alone: any lengths, any way into the model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.modeling_outputs import BaseModelOutput

from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.apply import isolate
from sft_plugins.packing.isolation.backends.unpack import Unpack, _buckets
from sft_plugins.packing.isolation.boundaries import Boundaries
from sft_plugins.packing.isolation.forward import install
from testkit.isolation_oracle import (
    gap,
    make_documents,
    make_labels,
    packed_batch,
    plain_batch,
    run_alone,
    run_packed,
    spill,
)
from testkit.tiny_models import WINDOW, build

# Through `isolate`, which turns to documents of equal length where a model pads wrongly (llama4 in transformers 5.16).
WAYS: dict[str, Callable[[Any], Any]] = {"unpack": functools.partial(isolate, backend="unpack"), "auto": isolate}

LENGTHS = [5, 9, 1, 17, 3, 9]
# dense, sliding window, chunked, experts, hybrid of Mamba and attention, sinks, recurrent, delta rule, wrapper
ARCHITECTURES = [
    "llama",
    "mistral",
    "llama4_text",
    "mixtral",
    "jamba",
    "gpt_oss",
    "mamba",
    "qwen3_next",
    "gemma3",
    "opt",
]
LOGITS, GRADIENTS = 1e-5, 1e-4

SHAPES = {
    "documents of one token": [1, 1, 4, 1, 1],
    "one document fills the row": [37],
    "lengths straddle the window": [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1],
    "one long, many short": [61, 2, 3, 1, 2, 5],
    "all alike": [8, 8, 8],
    "a sum that nothing divides": [13, 24],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_row_equals_documents_run_alone(name: str, lengths: list[int], way: str) -> None:
    tiny = build(name)
    documents = make_documents(lengths, tiny.vocab_size)
    alone = run_alone(tiny.model, documents)
    WAYS[way](tiny.model)
    found = gap(alone, run_packed(tiny.model, documents))
    assert found.logits <= LOGITS, found
    assert found.loss <= LOGITS, found
    assert found.gradients <= GRADIENTS, found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changing_one_document_changes_no_other(name: str, way: str) -> None:
    tiny = build(name)
    documents = make_documents(LENGTHS, tiny.vocab_size)
    assert spill(tiny.model, documents, 0, batch=plain_batch) > 1e-3, "without isolation it must"
    WAYS[way](tiny.model)
    assert max(spill(tiny.model, documents, changed) for changed in (0, 3)) <= LOGITS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "mixtral", "jamba", "gpt_oss"])
def test_five_hundred_documents_in_a_row(name: str, way: str) -> None:
    """In double precision, where 1500 tokens leave no room to call a leak rounding."""
    tiny = build(name)
    tiny.model.set_experts_implementation("eager")  # the fused one has no double precision
    tiny.model.double()
    lengths = np.random.default_rng(0).integers(1, 6, size=500).tolist()
    documents = make_documents(lengths, tiny.vocab_size)
    alone = run_alone(tiny.model, documents, gradients=False)
    WAYS[way](tiny.model)
    assert gap(alone, run_packed(tiny.model, documents, gradients=False)).logits <= 1e-13


def test_documents_of_equal_length_need_no_mask() -> None:
    """prophetnet numbers positions wrongly in a padded batch; without padding it is exact."""
    tiny = build("prophetnet")
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents)
    undo = install(tiny.model, Unpack())
    assert gap(alone, run_packed(tiny.model, documents)).logits > 1e-3
    undo()
    install(tiny.model, Unpack(padding=False))
    found = gap(alone, run_packed(tiny.model, documents))
    assert found.logits <= LOGITS, found
    assert found.gradients <= GRADIENTS, found


# --- ways into the model ------------------------------------------------------------------------------------------


def _lora(model: torch.nn.Module) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(
            model, LoraConfig(r=4, target_modules="all-linear", exclude_modules=["out_proj"], init_lora_weights=False)
        )
    return adapted.eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mamba", "opt"])
def test_lora_gradients_are_those_of_documents_run_alone(name: str, when: str, way: str) -> None:
    tiny = build(name)
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(_lora(copy.deepcopy(tiny.model)), documents)
    if when == "before":
        WAYS[way](tiny.model)
    model = _lora(tiny.model)
    if when == "after":
        WAYS[way](model.get_base_model())
    found = gap(alone, run_packed(model, documents))
    assert alone.gradients
    assert all("lora" in name for name in alone.gradients)
    assert found.logits <= LOGITS, found
    assert found.gradients <= GRADIENTS, found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "opt", "jamba"])
def test_gradient_checkpointing_recomputes_on_the_same_documents(name: str, reentrant: bool, way: str) -> None:
    tiny = build(name)
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents)
    tiny.model.train()  # dropout is off in tiny models; checkpointing works in training mode only
    tiny.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tiny.model.enable_input_require_grads()
    WAYS[way](tiny.model)
    found = gap(alone, run_packed(tiny.model, documents))
    assert found.logits <= LOGITS, found
    assert found.gradients <= GRADIENTS, found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_backbone_called_directly_is_isolated(name: str, way: str) -> None:
    """TRL's fused head calls `model.base_model` with every key of the batch, not the causal LM."""
    tiny = build(name)
    backbone = tiny.model.base_model
    backbone = backbone if backbone is not tiny.model else tiny.model.model
    documents = make_documents(LENGTHS, tiny.vocab_size)
    with torch.no_grad():
        alone = [backbone(input_ids=document[None], use_cache=False).last_hidden_state[0] for document in documents]
        WAYS[way](tiny.model)
        packed = backbone(**packed_batch(documents), use_cache=False).last_hidden_state[0].split(LENGTHS)
    for one, other in zip(alone, packed, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ["head first", "isolation first"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt_oss", "mamba", "jamba"])
def test_fused_lm_head_of_trl_sees_isolated_documents(name: str, order: str, way: str) -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL has no fused LM head (it came after 1.9)")
    tiny = build(name)
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents)
    steps = [utils.add_fused_lm_head, WAYS[way]]
    for step in steps if order == "head first" else reversed(steps):
        step(tiny.model)
    tiny.model.zero_grad()
    labels = torch.cat([torch.cat([torch.tensor([-100]), label[1:]]) for label in make_labels(documents)])[None]
    count = (labels != -100).sum()
    loss = tiny.model(**packed_batch(documents), labels=labels, fused_lm_head=True).loss * count
    loss.backward()
    assert loss.item() == pytest.approx(alone.loss, rel=1e-5)
    largest = max(float(g.abs().max()) for g in alone.gradients.values())
    for parameter_name, parameter in tiny.model.named_parameters():
        if parameter_name in alone.gradients:
            difference = (parameter.grad - alone.gradients[parameter_name]).abs().max()
            assert float(difference) <= GRADIENTS * largest, parameter_name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "mamba", "opt", "gpt_oss"])
def test_embeddings_instead_of_ids(name: str, way: str) -> None:
    tiny = build(name)
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents, gradients=False)

    def embedded(documents: Any) -> dict[str, Any]:
        batch = packed_batch(documents)
        batch["inputs_embeds"] = tiny.model.get_input_embeddings()(batch.pop("input_ids"))
        return batch

    WAYS[way](tiny.model)
    assert gap(alone, run_packed(tiny.model, documents, gradients=False, batch=embedded)).logits <= LOGITS


def test_positions_that_restart_elsewhere_than_at_zero_are_kept() -> None:
    tiny = build("llama")
    documents = make_documents([4, 6], tiny.vocab_size)
    install(tiny.model, Unpack())
    batch = packed_batch(documents)
    with torch.no_grad():
        expected = [
            tiny.model(input_ids=d[None], position_ids=torch.arange(3, 3 + len(d))[None], use_cache=False).logits
            for d in documents
        ]
        batch["position_ids"] = batch["position_ids"] + 3
        packed = tiny.model(**batch).logits
    torch.testing.assert_close(packed, torch.cat(expected, dim=1), atol=1e-5, rtol=1e-5)


# --- what comes back --------------------------------------------------------------------------------------------


def test_hidden_states_and_router_logits_are_packed_and_the_auxiliary_loss_counts_no_padding() -> None:
    tiny = build("mixtral")
    documents = make_documents(LENGTHS, tiny.vocab_size)
    options = {"output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        alone = [tiny.model(input_ids=d[None], use_cache=False, **options) for d in documents]
        install(tiny.model, Unpack())
        packed = tiny.model(**packed_batch(documents), **options)
    assert packed.past_key_values is None
    for layer, states in enumerate(packed.hidden_states):
        expected = torch.cat([out.hidden_states[layer] for out in alone], dim=1)
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    for layer, logits in enumerate(packed.router_logits):
        expected = torch.cat([out.router_logits[layer] for out in alone])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = tiny.model.config
    routed = tuple(torch.cat(layers) for layers in zip(*[out.router_logits for out in alone], strict=True))
    expected = load_balancing_loss_func(routed, config.num_local_experts, config.num_experts_per_tok)
    torch.testing.assert_close(packed.aux_loss, expected)


def test_tuples_come_back_as_tuples() -> None:
    tiny = build("llama")
    documents = make_documents(LENGTHS, tiny.vocab_size)
    install(tiny.model, Unpack())
    with torch.no_grad():
        named = tiny.model(**packed_batch(documents)).logits
        plain = tiny.model(**packed_batch(documents), return_dict=False)[0]
    assert torch.equal(named, plain)


def test_attention_weights_have_no_packed_form() -> None:
    tiny = build("gpt_oss")
    install(tiny.model, Unpack())
    with pytest.raises(ContaminationError, match="no packed form") as error:
        tiny.model(**packed_batch(make_documents([3, 4], tiny.vocab_size)), output_attentions=True)
    assert error.value.code == "output_attentions"


def _echo(lengths: list[int], **options: Any) -> tuple[list[torch.Size], BaseModelOutput]:
    """Unpack a stand-in backbone that answers with its own input, in every form that outputs take."""
    shapes: list[torch.Size] = []

    def backbone(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> BaseModelOutput:
        shapes.append(input_ids.shape)
        states = input_ids[..., None].expand(-1, -1, 3)
        streams = torch.cat([states, -states], dim=1)
        flat = input_ids.reshape(-1, 1).expand(-1, 5)
        pooled = torch.zeros(input_ids.shape[0] + 1, 7)
        return BaseModelOutput(last_hidden_state=states, hidden_states=(streams, flat, pooled, SimpleNamespace()))

    boundaries = Boundaries(np.asarray(lengths))
    row = torch.arange(boundaries.tokens)[None]
    return shapes, Unpack(**options).run(backbone, {"input_ids": row}, boundaries)


@pytest.mark.parametrize("options", [{}, {"padding": False}])
def test_every_token_comes_back_in_its_place(options: dict[str, bool]) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = generator.integers(2, 40, size=generator.integers(1, 30)).tolist()
        _, out = _echo(lengths, **options)
        row = torch.arange(sum(lengths))
        assert torch.equal(out.last_hidden_state, row[None, :, None].expand(1, -1, 3))
        streams, flat, pooled, cache = out.hidden_states
        assert torch.equal(streams, torch.cat([row, -row])[None, :, None].expand(1, -1, 3))
        assert torch.equal(flat, row[:, None].expand(-1, 5))
        assert pooled is None
        assert cache is None


def test_several_rows_come_back_as_rows() -> None:
    def backbone(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=input_ids[..., None].float())

    ids = torch.arange(14).view(2, 7)
    boundaries = Boundaries(np.array([2, 5, 3, 1, 3]), rows=2)
    assert torch.equal(Unpack().run(backbone, {"input_ids": ids}, boundaries).last_hidden_state[..., 0], ids.float())


def test_ranks_with_sharded_weights_make_equally_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call gathers them from all ranks: one rank calling once more would wait for ever."""
    assert len(_echo([90, 1, 1])[0]) == 2
    monkeypatch.setattr("sft_plugins.packing.isolation.backends.unpack._gathers_weights", lambda _: True)
    assert _echo([90, 1, 1])[0] == [(3, 90)]
    with pytest.raises(ContaminationError, match="one length at a time, and its weights are sharded") as error:
        _echo([90, 1, 1], padding=False)
    assert error.value.code == "sharded"


def test_a_third_more_slots_than_tokens_at_most_in_logarithmically_many_calls() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = np.minimum(generator.lognormal(3, 2, size=generator.integers(1, 200)).astype(int) + 1, 2000)
        buckets = _buckets(lengths, padding=True)
        assert sorted(np.concatenate(buckets).tolist()) == list(range(lengths.size))
        assert sum(len(bucket) * lengths[bucket].max() for bucket in buckets) <= 4 / 3 * lengths.sum()
        assert len(buckets) <= np.log(lengths.max()) / np.log(4 / 3) + 1


def test_buckets_by_hand() -> None:
    as_lists: Callable[[Any], list[list[int]]] = lambda buckets: [bucket.tolist() for bucket in buckets]  # noqa: E731
    assert as_lists(_buckets(np.array([9, 2, 8, 1, 1]), padding=True)) == [[0, 2], [1, 3], [4]]
    assert as_lists(_buckets(np.array([9, 2, 8, 2, 9]), padding=False)) == [[0, 4], [2], [1, 3]]


def test_without_padding_every_call_holds_documents_of_one_length() -> None:
    shapes, _ = _echo([4, 2, 4, 3, 2], padding=False)
    assert shapes == [(2, 4), (1, 3), (2, 2)]


# --- ordinary forwards, copies, removal ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "jamba", "gpt_oss"])
def test_padded_batches_and_generation_are_untouched(name: str) -> None:
    tiny = build(name)
    ids = torch.stack(make_documents([8, 8], tiny.vocab_size))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        before = tiny.model(input_ids=ids, attention_mask=mask).logits
        text_before = tiny.model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        install(tiny.model, Unpack())
        after = tiny.model(input_ids=ids, attention_mask=mask).logits
        text_after = tiny.model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(before, after)
    assert torch.equal(text_before, text_after)


def test_removal_leaves_the_model_as_it_was() -> None:
    tiny = build("opt")
    before = {name: set(vars(module)) for name, module in tiny.model.named_modules()}
    keys = list(tiny.model.state_dict())
    undo = install(tiny.model, Unpack())
    assert list(tiny.model.state_dict()) == keys
    undo()
    assert {name: set(vars(module)) for name, module in tiny.model.named_modules()} == before


def test_a_copy_runs_its_own_weights() -> None:
    tiny = build("opt")
    documents = make_documents(LENGTHS, tiny.vocab_size)
    install(tiny.model, Unpack())
    twin = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    alone = run_alone(twin, documents)
    assert gap(alone, run_packed(twin, documents)).logits <= LOGITS
    assert gap(alone, run_packed(tiny.model, documents)).logits > 1e-3


def test_bf16_differs_from_documents_alone_no_more_than_bf16_itself_does() -> None:
    """The reference is fp32: packed bf16 may be as far from it as bf16 documents run alone are (twice, for rounding)."""
    tiny = build("jamba")
    documents = make_documents(LENGTHS, tiny.vocab_size)
    reference = run_alone(tiny.model, documents, gradients=False)
    install(tiny.model, Unpack())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = gap(reference, run_alone(tiny.model, documents, gradients=False)).logits
        packed = gap(reference, run_packed(tiny.model, documents, gradients=False)).logits
    assert packed <= 2 * alone
