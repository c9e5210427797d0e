"""Looking at a model with 4-bit weights leaves it trainable (bitsandbytes on a CPU with AVX512-BF16 does not, by itself)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from sft_plugins._preserve import untouched

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (Axolotl's environment has it)")


def gradient_after(look: Callable[[nn.Module], AbstractContextManager[Any]]) -> float:
    """Largest gradient that reaches the input of a 4-bit layer in training mode, after a forward under `look`."""
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)).to(
        "cpu"
    )
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


def test_a_look_leaves_four_bit_layers_trainable() -> None:
    assert gradient_after(untouched) == gradient_after(nullcontext) > 0


def test_an_ordinary_evaluation_does_not() -> None:
    """The guard of the test above: were this fixed in bitsandbytes, `untouched` need not see to it."""
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes never changes the layout")

    assert gradient_after(evaluating) == 0.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    with torch.no_grad():
        yield
    model.train()
