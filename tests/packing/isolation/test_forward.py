"""What a packed forward changes on the way, it puts back: after success and after an exception."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sft_plugins.packing import isolate
from testkit.isolation_oracle import make_documents, packed_batch
from testkit.tiny_models import build


def checkpointed() -> tuple[nn.Module, list[torch.Tensor], dict[str, Any]]:
    """An isolated model that recomputes its layers; its checkpoint functions by the name of their layer."""
    tiny = build("llama")
    isolate(tiny.model)
    tiny.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tiny.model.train()
    return tiny.model, make_documents([5, 9, 3], tiny.vocab_size), functions(tiny.model)


def functions(model: nn.Module) -> dict[str, Any]:
    name = "_gradient_checkpointing_func"
    return {key: module.__dict__[name] for key, module in model.named_modules() if callable(module.__dict__.get(name))}


def plain_loss(model: nn.Module, document: torch.Tensor) -> float:
    return float(model(input_ids=document[None], labels=document[None]).loss.detach())


def test_a_plain_forward_after_a_packed_one_is_as_before() -> None:
    model, documents, before = checkpointed()
    loss = plain_loss(model, documents[1])
    model(**packed_batch(documents)).logits.sum().backward()
    assert before, "nothing is checkpointed: the test would prove nothing"
    assert functions(model) == before
    assert plain_loss(model, documents[1]) == loss


def test_a_plain_forward_after_a_packed_one_that_failed_is_as_before() -> None:
    model, documents, before = checkpointed()
    loss, implementation = plain_loss(model, documents[1]), model.config._attn_implementation

    def fail(*_: Any) -> None:
        raise RuntimeError("broken on purpose")

    hook = model.model.layers[-1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        model(**packed_batch(documents))
    hook.remove()
    assert functions(model) == before
    assert model.config._attn_implementation == implementation
    assert plain_loss(model, documents[1]) == loss
    # and packed rows are isolated as before: the same logits for a document whatever stands before it
    first, second = (
        model(**packed_batch([other, documents[1]])).logits[0, -len(documents[1]) :]
        for other in (documents[0], documents[2])
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5 * float(first.detach().abs().max()))
