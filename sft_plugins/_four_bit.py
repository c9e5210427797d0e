"""4-bit weights of bitsandbytes, kept as training needs them.

On a CPU with AVX512-BF16, bitsandbytes 0.50 lays a 4-bit layer's weight out anew at its first forward in evaluation mode, and
leaves it so: from then on the layer passes no gradient back, in training mode either, and nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_SWITCH = "support_avx512bf16_for_cpu"


@contextmanager
def trainable_four_bit(model: nn.Module) -> Iterator[None]:
    """Inside, forwards in evaluation mode leave the layout of 4-bit weights alone."""
    layers = [module for module in model.modules() if getattr(module, _SWITCH, False)]
    try:
        for layer in layers:
            setattr(layer, _SWITCH, False)
        yield
    finally:
        for layer in layers:
            setattr(layer, _SWITCH, True)
