"""`unpack` holds for every way into a model, and leaves ordinary forwards, copies and the bare model as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sft_plugins.packing.isolation.backends.unpack import Unpack
from sft_plugins.packing.isolation.forward import install
from testkit.isolated import ARCHITECTURES, GRADIENTS, LENGTHS, LOGITS, WAYS
from testkit.isolation_oracle import (
    gap,
    make_documents,
    make_labels,
    packed_batch,
    run_alone,
    run_packed,
)
from testkit.tiny_models import build

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
