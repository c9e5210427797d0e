"""A half-precision model computed in float32: its own code and weights, so that a leak is no longer lost in rounding.

    bf16, a hook that adds 0.04 of the row's running mean: difference 4e-2, and 6e-2 would pass for rounding
    the same in here:                                      difference 4e-2, and 1e-5 passes for rounding

Every operation of torch gets its half-precision inputs as float32, the weights among them, one operation at a time: memory
holds no second model. Views and selections stay as they are, and what they give is widened where it is used. Kernels that
are not torch's own (flash attention, scans) take what they take; where one gives up on float32, so does the whole attempt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

HALF = (torch.float16, torch.bfloat16)

_SELECTIONS = frozenset({"aten::embedding", "aten::index_select", "aten::gather", "aten::index"})
"""They copy values out of weights without computing: widening the whole weight first would cost its size again."""


class _WideOperations(TorchDispatchMode):
    """Below autograd, where an operation is what it computes: nothing of the graph knows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in HALF:
            kwargs["dtype"] = torch.float32
        schema = func._schema
        if schema.is_mutable:
            written = [a.name for a in schema.arguments if a.alias_info is not None]
            args = [a if s.name in written else _wide(a) for a, s in zip(args, schema.arguments, strict=False)]
            kwargs = {name: a if name in written else _wide(a) for name, a in kwargs.items()}
            return func(*args, **kwargs)
        if any(returned.alias_info is not None for returned in schema.returns):
            return func(*args, **kwargs)  # a view of what is there
        if func.namespace == "aten" and schema.name not in _SELECTIONS:
            args, kwargs = _wide(args), _wide(kwargs)
        return _wide(func(*args, **kwargs))


class _WideWhereRefused(TorchFunctionMode):
    """Above autograd: some functions compare the types of their inputs before any operation runs (convolutions)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            wide_args, wide_kwargs = _wide(args), _wide(kwargs)
            if all(a is b for a, b in zip((*args, *kwargs.values()), (*wide_args, *wide_kwargs.values()), strict=True)):
                raise
            return func(*wide_args, **wide_kwargs)


def _wide(values: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.to(torch.float32) if t.dtype in HALF else t, values)


@contextmanager
def in_float32() -> Iterator[None]:
    """Compute in float32 inside, products of matrices without TF32, compiled parts of a model as plain code."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        with torch.compiler.set_stance("force_eager"), _WideOperations(), _WideWhereRefused():
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
