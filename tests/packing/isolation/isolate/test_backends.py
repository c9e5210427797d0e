"""`isolate`: the fastest backend that is exact is taken, and the probe sees a model that is not."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
import torch

import sft_plugins.packing.isolation.apply as isolation
from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.apply import IsolationReport, check_isolation, isolate
from sft_plugins.packing.isolation.backends.varlen import IMPLEMENTATION
from sft_plugins.packing.isolation.boundaries import Boundaries
from testkit.isolated import assert_exact, documents_of, tiny_llama
from testkit.isolation_oracle import run_alone, run_packed
from testkit.leaky import LEAKS
from testkit.tiny_models import build


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "varlen"),
        ("gpt_oss", "varlen"),
        ("mamba", "unpack"),
        ("leaky_attention", "varlen"),
        ("leaky_state", "unpack"),
    ],
)
def test_auto_takes_the_fastest_backend_that_is_exact(name: str, backend: str) -> None:
    tiny = build(name)
    alone = run_alone(tiny.model, documents_of(tiny))
    report = isolate(tiny.model)
    assert (report.backend, report.model) == (backend, type(tiny.model).__name__)
    assert report.alone_delta <= report.tolerance <= 1e-4
    assert report.leaked == 0
    assert_exact(alone, run_packed(tiny.model, documents_of(tiny)))
    assert check_isolation(tiny.model).backend == backend


@pytest.mark.parametrize("backend", ["varlen", "unpack"])
def test_each_backend_by_name_is_exact(backend: str) -> None:
    tiny = build("gpt_oss")
    alone = run_alone(tiny.model, documents_of(tiny))
    assert isolate(tiny.model, backend=backend).backend == backend
    assert_exact(alone, run_packed(tiny.model, documents_of(tiny)))


def test_native_serves_where_the_models_own_code_isolates() -> None:
    """Without a cache, transformers' own sdpa tells restarting positions apart for Llama, and the probe says so."""
    tiny = build("llama")
    alone = run_alone(tiny.model, documents_of(tiny))
    report = isolate(tiny.model, backend="native")
    assert (report.backend, report.packed_attention) == ("native", "sdpa")
    assert_exact(alone, run_packed(tiny.model, documents_of(tiny)))


@pytest.mark.parametrize(
    ("name", "backend"), [("leaky_attention", "native"), ("leaky_state", "native"), ("leaky_state", "varlen")]
)
def test_a_backend_that_does_not_isolate_this_model_is_refused_with_what_was_measured(name: str, backend: str) -> None:
    tiny = build(name)
    before = set(tiny.model.__dict__)
    with pytest.raises(ContaminationError, match=f"no backend isolates.*{backend}: ") as caught:
        isolate(tiny.model, backend=backend)
    assert caught.value.code == "contaminated"
    assert "auto" in str(caught.value.remedy)
    assert set(tiny.model.__dict__) == before


@pytest.mark.parametrize("name", LEAKS)
def test_the_probe_fails_for_a_model_that_is_not_isolated(name: str) -> None:
    with pytest.raises(ContaminationError, match=r"moved the logits of|other logits packed than alone") as caught:
        check_isolation(build(name).model)
    assert caught.value.code == "contaminated"


def test_the_probe_sees_a_leak_from_one_document_into_one_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes documents 1 and 2 for one; all else is isolated."""
    tiny = build("llama")
    isolate(tiny.model)
    groups, ungroup = Boundaries.groups, Boundaries.ungroup
    monkeypatch.setattr(Boundaries, "groups", lambda self, device: groups(glued(self), device))
    monkeypatch.setattr(Boundaries, "ungroup", lambda self, device: ungroup(glued(self), device))
    with pytest.raises(ContaminationError, match="changing other documents moved"):
        check_isolation(tiny.model)


def glued(boundaries: Boundaries) -> Boundaries:
    first, second, third, *rest = boundaries.lengths.tolist()
    return Boundaries(np.array([first, second + third, *rest]))


def test_the_probe_sees_wrong_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No document sees another, but positions run on through the row: learned positions are another model's."""
    tiny = build("gpt2")
    isolate(tiny.model)
    inner = tiny.model.transformer.wpe.forward
    monkeypatch.setattr(tiny.model.transformer.wpe, "forward", lambda ids: inner(torch.arange(ids.shape[-1])[None]))
    with pytest.raises(ContaminationError, match="other logits packed than alone"):
        check_isolation(tiny.model)


def test_the_probe_leaves_everything_as_it_was() -> None:
    """Modes of every module, gradients, buffers, and the generators of Python, NumPy and torch."""
    tiny = build("qwen3_moe")
    model = tiny.model
    model.train()
    model.model.layers[0].eval()
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    modes = {name: module.training for name, module in model.named_modules()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    isolate(model)
    check_isolation(model)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert torch.is_grad_enabled()


def test_training_mode_and_dropout_do_not_disturb_the_proof() -> None:
    tiny = build("llama", attention_dropout=0.5)
    tiny.model.train()
    assert isolate(tiny.model).perturbed_delta == 0
    assert tiny.model.training


def test_the_report_says_what_was_proved() -> None:
    began = time.perf_counter()
    report = isolate(build("gpt_oss").model, share_prefixes=True)
    assert 0 < report.seconds < time.perf_counter() - began
    assert report.prefix_trees
    values = json.loads(json.dumps(report.to_dict()))
    assert values["backend"] == "varlen"
    assert values["documents"] == list(report.documents)
    assert min(report.documents) == 1
    assert max(report.documents) > 2 * 7, "the longest document crosses the window of 7 twice"
    assert "undo" not in "".join(values)
    text = str(report)
    for said in ("GptOssForCausalLM", "float32", "varlen", "eager", IMPLEMENTATION, "0 tokens moved"):
        assert said in text
    with pytest.raises(AttributeError):
        report.backend = "other"  # type: ignore[misc]


def test_a_window_too_long_for_the_probe_is_noted() -> None:
    report = isolate(build("mistral", sliding_window=4096).model)
    assert any("sliding_window = 4096" in note for note in report.notes)


def test_candidates_start_with_the_models_own_kernels_where_it_has_them() -> None:
    """Rows that are padded come before one length at a time, which takes more calls; none takes trees unproved."""
    model = tiny_llama()
    plain = [("varlen", None), ("unpack", True), ("unpack", False)]
    assert [(b.name, getattr(b, "padding", None)) for b in isolation._candidates(model, "auto")] == plain
    assert [(b.name, b.padding) for b in isolation._candidates(model, "unpack")] == plain[1:]
    model.config._attn_implementation_internal = "flash_attention_2"
    found = isolation._candidates(model, "auto")
    assert [(b.name, getattr(b, "padding", None)) for b in found] == [("native", None), *plain]
    assert not any(b.trees for b in found)


def test_reports_are_equal_but_for_their_way_back() -> None:
    report = isolate(build("llama").model)
    assert isinstance(report, IsolationReport)
    assert report == IsolationReport(**{**vars(report), "_undo": None})
