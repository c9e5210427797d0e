"""The device that the tests of `tests/gpu` run on: CUDA, or another one to rehearse their code on.

make test-gpu                the tests, on CUDA
make test-gpu DEVICE=cpu     a rehearsal: all but the CUDA kernels themselves
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from testkit.isolation_oracle import Batch, packed_batch

DEVICE = os.environ.get("SFT_PLUGINS_TEST_DEVICE", "cuda")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.startswith("cuda") and not torch.cuda.is_available(),
        reason="needs a CUDA device (make test-gpu DEVICE=cpu rehearses these tests without one)",
    ),
]


def on_device(batch: Batch) -> Batch:
    """The batch with its tensors on `DEVICE`."""
    return {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def packed_on_device(documents: Sequence[torch.Tensor]) -> Batch:
    return on_device(packed_batch(documents))


def host_arguments() -> dict[str, Any]:
    """Of `TrainingArguments`, for a run on `DEVICE`."""
    return {"use_cpu": not DEVICE.startswith("cuda")}
