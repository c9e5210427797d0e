"""`untouched` puts every state back, also after an exception; `adapter_off` keeps `requires_grad` (C4, C5)."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from sft_plugins._preserve import adapter_off, seeded, untouched
from testkit.tokenizers import dump
from testkit.watched_runs import byte_tokenizer, lora, tiny_model


def _draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def _seed() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


@pytest.mark.parametrize("fails", [False, True])
def test_every_random_generator_continues_where_it_was(fails: bool) -> None:
    """C2, at its root."""
    model = nn.Linear(1, 1)
    _seed()
    expected = _draws()
    _seed()
    with contextlib.suppress(KeyError), untouched(model):
        _draws()
        if fails:
            raise KeyError
    assert _draws() == expected


def test_seeded_draws_do_not_move_the_generators_outside() -> None:
    _seed()
    expected = _draws()
    _seed()
    with seeded(5):
        first = torch.rand(3)
    with seeded(5):
        assert torch.equal(torch.rand(3), first)
    assert _draws() == expected


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_keeps_its_own_mode_and_each_parameter_its_flag(fails: bool) -> None:
    """C5: a part frozen in evaluation mode stays there, the rest returns to training."""
    model = tiny_model().train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with contextlib.suppress(KeyError), untouched(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        model.train()
        model.requires_grad_(True)
        if fails:
            raise KeyError
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.is_grad_enabled()


def test_a_module_that_works_in_train_is_not_asked_to() -> None:
    class Merging(nn.Linear):
        merged = 0

        def train(self, mode: bool = True) -> Merging:
            self.merged += 1
            return super().train(mode)

    layer = Merging(2, 2)
    with untouched(layer):
        assert not layer.training
    assert layer.training
    assert layer.merged == 0


def test_configuration_and_generation_configuration_come_back() -> None:
    model = tiny_model()
    model.config.use_cache = False
    generation, before = model.generation_config, model.generation_config.to_dict()
    with untouched(model):
        model.config.use_cache = True
        model.generation_config.top_k = 7
        model.generation_config = type(generation)(top_p=0.5)
    assert model.config.use_cache is False
    assert model.generation_config is generation
    assert generation.to_dict() == before


def test_rotary_embeddings_that_grow_with_length_shrink_back() -> None:
    """A probe longer than any training row would otherwise change the angles of the rows that follow."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = tiny_model(max_position_embeddings=16, rope_parameters=rope).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model(ids).logits
        grown = model.model.rotary_emb.inv_freq.clone()
        with untouched(model):
            model(torch.arange(5, 105)[None])
            assert not torch.equal(model.model.rotary_emb.inv_freq, grown), "the probe must have moved it"
        assert torch.equal(model.model.rotary_emb.inv_freq, grown)
        assert torch.equal(model(ids).logits, expected)


def test_the_tokenizer_comes_back() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer._tokenizer.enable_truncation(max_length=9)
    before = dump(tokenizer), tokenizer._tokenizer.truncation
    with untouched(nn.Linear(1, 1), tokenizer):
        tokenizer.padding_side = "left"
        tokenizer(["a", "bb"], padding=True)
        tokenizer("a long enough text", truncation=False)
    assert (dump(tokenizer), tokenizer._tokenizer.truncation) == before


def test_disable_adapter_leaves_no_weight_trainable() -> None:
    """C4: PEFT's own context leaves the frozen adapter trainable; this one does not."""
    model = lora(tiny_model())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)  # lora_B frozen by the user
    flags = [p.requires_grad for p in model.parameters()]
    with model.disable_adapter():
        pass
    assert [p.requires_grad for p in model.parameters()] != flags, "PEFT has changed: this restoration may go"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    with pytest.raises(ValueError, match="inside"), adapter_off(model):
        raise ValueError("inside")
    assert [p.requires_grad for p in model.parameters()] == flags


def test_adapter_off_may_be_nested() -> None:
    model = lora(tiny_model()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        ids = torch.arange(5, 15)[None]
        adapted = model(input_ids=ids).logits
        with adapter_off(model):
            base = model(input_ids=ids).logits
            with adapter_off(model):
                assert torch.equal(model(input_ids=ids).logits, base)
            assert torch.equal(model(input_ids=ids).logits, base)
        assert torch.equal(model(input_ids=ids).logits, adapted)
        assert not torch.equal(adapted, base)
