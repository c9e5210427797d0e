"""How far packed logits may be from those of documents alone: both sides of the limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sft_plugins.errors import ContaminationError
from sft_plugins.packing import check_isolation, isolate
from sft_plugins.packing.isolation import apply
from sft_plugins.packing.isolation.proof.observe import _control
from testkit.tiny_models import build


def isolated_and_wrong_by(share: float) -> torch.nn.Module:
    """An isolated model whose packed rows have logits wrong by `share` of the largest; documents alone are right."""
    model = build("llama").model
    isolate(model)
    seen: dict[str, Any] = {"packed": False, "largest": 0.0}

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen["packed"] = kwargs.get("cu_seq_lens_q") is not None

    def shift(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        if seen["packed"]:  # by one amount whatever the documents: nothing leaks
            return logits + share * seen["largest"]
        seen["largest"] = max(seen["largest"], float(logits.detach().abs().max()))
        return logits

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.lm_head.register_forward_hook(shift)
    return model


@pytest.mark.parametrize("share", [0.0, 3e-6])
def test_rounding_is_no_difference(share: float) -> None:
    report = check_isolation(isolated_and_wrong_by(share))
    assert report.alone_delta == pytest.approx(share, abs=2e-6)


@pytest.mark.parametrize("share", [2e-4, 1e-2])
def test_packed_logits_beyond_the_tolerance_are_refused(share: float) -> None:
    """In float32 the limit lies between 1e-5 and 1e-4 of the largest logit."""
    with pytest.raises(ContaminationError, match="other logits packed than alone") as caught:
        check_isolation(isolated_and_wrong_by(share))
    assert caught.value.code == "contaminated"


def test_tf32_widens_the_limit_on_gpus_alone() -> None:
    own = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with pytest.raises(ContaminationError, match="other logits packed than alone"):
            check_isolation(isolated_and_wrong_by(2e-4))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = own


def test_logits_that_are_no_number_are_refused() -> None:
    with pytest.raises(ContaminationError) as caught:
        check_isolation(isolated_and_wrong_by(float("nan")))
    assert caught.value.code == "contaminated"


def test_the_effect_of_earlier_tokens_is_told_in_parts_of_the_largest_logit() -> None:
    logits, moved = [torch.tensor([1.0, -4.0]), torch.tensor([2.0])], torch.tensor([9.0, 9.0, 0.5, 2.0])
    assert _control(torch.nn.Identity(), logits, moved, middle=1) == (4.0, 0.5)
    with pytest.raises(ContaminationError) as caught:
        _control(torch.nn.Identity(), logits, torch.zeros(4), middle=1)
    assert caught.value.code == "probe_blind"


def test_the_seconds_of_a_proof_are_those_of_its_trees_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").model
    isolate(model, backend="varlen")
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(apply.time, "perf_counter", lambda: float(next(ticks)))
    without = check_isolation(model)
    with_trees = check_isolation(model, share_prefixes=True)
    assert with_trees.seconds >= without.seconds + 10
