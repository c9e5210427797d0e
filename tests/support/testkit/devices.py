"""The device that the tests of `tests/gpu` run on: CUDA where there is one; else the CPU, to rehearse them.

make test-gpu                the tests, on CUDA
make test-gpu DEVICE=cpu     the rehearsal, as in `make test`: `testkit.flash_stand_in` computes in place of torch's kernel
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from sft_plugins.packing.isolation.backends import varlen as attention
from sft_plugins.packing.isolation.backends.kernels import varlen
from testkit.flash_stand_in import flash_on_cpu
from testkit.isolation_oracle import Batch, packed_batch

DEVICE = os.environ.get("SFT_PLUGINS_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
ON_CUDA = DEVICE.startswith("cuda")


@contextmanager
def kernel_calls() -> Iterator[list[Any]]:
    """One entry per call of the variable-length kernel: torch's own on CUDA, the stand-in elsewhere."""
    if not ON_CUDA:
        with flash_on_cpu() as calls:
            yield calls
        return
    calls = []
    called = lambda *given, **named: calls.append(named) or varlen(*given, **named)  # noqa: E731
    with mock.patch.object(attention, "varlen", called):
        yield calls


def on_device(batch: Batch) -> Batch:
    """The batch with its tensors on `DEVICE`."""
    return {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def packed_on_device(documents: Sequence[torch.Tensor]) -> Batch:
    return on_device(packed_batch(documents))


def host_arguments() -> dict[str, Any]:
    """Of `TrainingArguments`, for a run on `DEVICE`."""
    return {"use_cpu": not ON_CUDA}
