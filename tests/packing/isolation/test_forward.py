"""What a packed forward changes on the way, it puts back: after success and after an exception."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sft_plugins.errors import ContaminationError
from sft_plugins.packing import isolate
from testkit.isolation_oracle import gap, make_documents, packed_batch, run_alone, run_packed
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


class TakesNoPositions(type(build("llama").model)):  # type: ignore[misc]
    """As models do that count positions themselves."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, use_cache: bool | None = None
    ) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_a_forward_that_takes_no_positions_is_given_none() -> None:
    tiny = build("llama")
    tiny.model.__class__ = TakesNoPositions
    documents = make_documents([5, 9, 3], tiny.vocab_size)
    alone = run_alone(tiny.model, documents)
    isolate(tiny.model)
    assert gap(alone, run_packed(tiny.model, documents)).logits <= 1e-5


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


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "falcon"])
def test_p23_layers_checkpointed_by_hand_are_exact(name: str) -> None:
    """P23: recomputed inside the boundaries that they ran in; it was a bare CheckpointError."""
    tiny = build(name)
    documents = make_documents([5, 9, 3], tiny.vocab_size)
    alone = run_alone(tiny.model, documents)
    isolate(tiny.model)
    recomputed = []
    for layer in next(module for module in tiny.model.modules() if isinstance(module, nn.ModuleList)):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    attention = next(module for module in tiny.model.modules() if type(module).__name__.endswith("Attention"))
    attention.register_forward_hook(lambda *_: recomputed.append(1))
    measured = gap(alone, run_packed(tiny.model, documents))
    assert len(recomputed) > 1, "nothing was recomputed: the test would prove nothing"
    assert measured.logits <= 1e-5
    assert measured.gradients <= 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
def test_p23_recompute_that_nobody_can_follow_is_refused_by_name(reentrant: bool) -> None:
    """P23: checkpointing inside a function of one's own: a bare error, or with `use_reentrant` gradients of NaN."""
    tiny = build("llama")
    isolate(tiny.model)
    tiny.model.enable_input_require_grads()
    for layer in tiny.model.model.layers:

        def forward(*args: Any, own: Any = layer.forward, **kwargs: Any) -> Any:
            return checkpoint(functools.partial(own, **kwargs), *args, use_reentrant=reentrant)

        layer.forward = forward
    documents = make_documents([5, 9, 3], tiny.vocab_size)
    with pytest.raises(ContaminationError, match=r"\[recomputed_outside\] a layer around LlamaAttention"):
        run_packed(tiny.model, documents)
    isolate(tiny.model, backend="unpack")  # the remedy: its layers know nothing of documents
    measured = gap(run_alone(tiny.model, documents), run_packed(tiny.model, documents))
    assert measured.logits <= 1e-5
    assert measured.gradients <= 1e-4


def test_what_is_put_on_later_is_proved_at_the_next_packed_forward() -> None:
    """A replaced forward that lets documents see one another is refused, one that does not is taken; each proof runs once."""
    tiny = build("llama")
    documents = make_documents([5, 9, 3], tiny.vocab_size)
    isolate(tiny.model)
    twin = copy.deepcopy(tiny.model)
    mlp = tiny.model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x)
    forwards: list[int] = []
    mlp.register_forward_hook(lambda *_: forwards.append(1))
    run_packed(tiny.model, documents, gradients=False)
    proved = len(forwards)
    run_packed(tiny.model, documents, gradients=False)
    assert proved > 5
    assert len(forwards) == proved + 1
    mlp.forward = lambda x: own(x + 0.1 * x.cumsum(1))
    for model in (tiny.model, tiny.model):
        with pytest.raises(ContaminationError, match="was changed since it was isolated") as caught:
            run_packed(model, documents, gradients=False)
        assert caught.value.code == "contaminated"
    alone = run_alone(twin, documents, gradients=False)
    assert gap(alone, run_packed(twin, documents, gradients=False)).logits <= 1e-5
