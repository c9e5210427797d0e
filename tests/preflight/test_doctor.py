"""A diagnosis leaves a model as it was: what was installed is installed, whatever comes of the measuring."""

from __future__ import annotations

from typing import Any

import pytest

from sft_plugins.packing import isolate
from sft_plugins.packing.isolation.forward import installed_backend
from sft_plugins.preflight.doctor import diagnose
from testkit.tiny_models import build


@pytest.mark.parametrize("isolated", [True, False])
def test_a_model_is_as_isolated_as_before(isolated: bool) -> None:
    model = build("llama").model
    if isolated:
        isolate(model, backend="unpack")
    before = installed_backend(model)
    diagnosis = diagnose(model)
    assert diagnosis.refusal is None
    assert diagnosis.report is not None
    assert diagnosis.report.backend == "varlen", "measured on the model itself, not on what was installed"
    assert installed_backend(model) is before
    assert (before is not None) is isolated


def test_a_model_is_as_isolated_as_before_when_the_measuring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").model
    isolate(model)
    before = installed_backend(model)
    assert before is not None

    def broken(*_: Any, **__: Any) -> Any:
        assert installed_backend(model) is None
        raise MemoryError

    monkeypatch.setattr("sft_plugins.packing.reference_of", broken)
    with pytest.raises(MemoryError):
        diagnose(model)
    assert installed_backend(model) is before
