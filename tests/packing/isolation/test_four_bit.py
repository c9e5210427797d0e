"""Looking at a model with 4-bit weights leaves it trainable (bitsandbytes 0.50 by itself does not, on AVX512-BF16)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from sft_plugins._preserve import _FOUR_BIT_SWITCH, untouched

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (Axolotl's environment has it)")


class SpoiltByEvaluation(nn.Linear):
    """What bitsandbytes does on some CPUs: while its switch is on, a forward in evaluation mode ends all gradients."""

    packed = False

    def __init__(self, inputs: int, outputs: int, bias: bool, **_: Any) -> None:
        super().__init__(inputs, outputs, bias=bias, dtype=torch.bfloat16)
        setattr(self, _FOUR_BIT_SWITCH, True)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.packed = self.packed or (getattr(self, _FOUR_BIT_SWITCH) and not self.training)
        return super().forward(states).detach() if self.packed else super().forward(states)


LAYERS = [bnb.nn.Linear4bit, SpoiltByEvaluation]


def gradient_after(look: Callable[[nn.Module], AbstractContextManager[Any]], layer: Any) -> float:
    """Largest gradient that reaches the input of a 4-bit layer in training mode, after a forward under `look`."""
    torch.manual_seed(0)
    model = nn.Sequential(layer(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)).to("cpu")
    states = torch.randn(3, 64, dtype=torch.bfloat16)
    model.train()
    with look(model):
        model(states)
    states.requires_grad_()
    out = model(states)
    if not out.requires_grad:
        return 0.0
    out.float().square().sum().backward()
    return 0.0 if states.grad is None else float(states.grad.abs().max())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_look_leaves_four_bit_layers_trainable(layer: Any) -> None:
    assert gradient_after(untouched, layer) == gradient_after(nullcontext, layer) > 0


def test_the_comparison_sees_an_evaluation_that_spoils_them() -> None:
    assert gradient_after(evaluating, SpoiltByEvaluation) == 0.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    with torch.no_grad():
        yield
    model.train()
