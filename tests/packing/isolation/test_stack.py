"""Isolation is a stack: what is undone gives back what was, whatever was put around the model in between."""

from __future__ import annotations

import copy
import threading
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from sft_plugins.errors import ContaminationError
from sft_plugins.packing import check_isolation, isolate
from sft_plugins.packing.isolation.changes import _same
from sft_plugins.packing.isolation.forward import installed_backend, set_aside
from testkit.isolation_oracle import gap, make_documents, run_alone, run_packed
from testkit.tiny_models import build

LENGTHS = [9, 6, 5]


def exact(model: nn.Module, vocabulary: int) -> bool:
    documents = make_documents(LENGTHS, vocabulary)
    alone = run_alone(model, documents, gradients=False)
    return gap(alone, run_packed(model, documents, gradients=False)).logits <= 1e-5


def wrap_as_accelerate_does(model: nn.Module) -> None:
    """`Accelerator.prepare` under bf16, as `transformers.Trainer(bf16=True)` calls it."""
    from accelerate.utils import convert_outputs_to_fp32

    model._original_forward = model.forward
    inner = getattr(model.forward, "__func__", model.forward)
    model.forward = MethodType(torch.autocast("cpu", dtype=torch.bfloat16)(inner), model)
    model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)


@pytest.mark.parametrize("name", ["opt", "gpt_oss", "mamba"])
def test_p20_an_inner_isolation_gives_the_outer_one_back(name: str) -> None:
    """P20: `with isolate(model)` in a callback left an isolated model without any isolation."""
    tiny = build(name)
    outer = isolate(tiny.model)
    with isolate(tiny.model, backend="unpack"):
        assert check_isolation(tiny.model).backend == "unpack"
    assert check_isolation(tiny.model).backend == outer.backend
    assert exact(tiny.model, tiny.vocab_size)
    with pytest.raises(ContaminationError), isolate(tiny.model, backend="native"):
        pass
    assert exact(tiny.model, tiny.vocab_size)
    outer.undo()
    assert installed_backend(tiny.model) is None
    assert not [key for module in tiny.model.modules() for key in module.__dict__ if key.startswith("_sft_plugins")]


@pytest.mark.parametrize("first_undone", [0, 1])
def test_p20_isolations_are_undone_in_any_order(first_undone: int) -> None:
    """P20: each undo takes off its own."""
    tiny = build("falcon")
    reports = [isolate(tiny.model), isolate(tiny.model)]
    reports[first_undone].undo()
    reports[first_undone].undo()
    assert exact(tiny.model, tiny.vocab_size)
    reports[1 - first_undone].undo()
    with pytest.raises(ContaminationError):
        check_isolation(tiny.model)
    assert "forward" not in tiny.model.__dict__


def test_p20_isolating_again_and_again_makes_no_forward_deeper() -> None:
    """P20: a notebook cell, run many times."""
    model = build("llama").model
    isolate(model)
    forward = model.forward
    for _ in range(3):
        isolate(model)
    assert model.forward is forward


@pytest.mark.parametrize("isolated_before", [True, False])
def test_p21_isolation_is_repeated_on_a_model_that_accelerate_wrapped(isolated_before: bool) -> None:
    """P21: RecursionError inside a false refusal, and no forward worked any more."""
    tiny = build("llama")
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents, gradients=False)
    reports = [isolate(tiny.model)] if isolated_before else []
    wrap_as_accelerate_does(tiny.model)
    for _ in range(2):
        reports.append(isolate(tiny.model))
        assert reports[-1].alone_delta <= reports[-1].tolerance <= 1e-4
        assert 1e-4 < gap(alone, run_packed(tiny.model, documents, gradients=False)).logits < 0.1, "bf16, not a leak"
    twin = copy.deepcopy(tiny.model)
    for report in reports:
        report.undo()
    assert tiny.model(input_ids=documents[0][None]).logits.dtype == torch.float32
    assert not isolated_before or gap(alone, run_packed(tiny.model, documents, gradients=False)).logits > 0.1
    isolate(tiny.model)
    assert gap(alone, run_packed(tiny.model, documents, gradients=False)).logits < 0.1
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.zero_()
    assert gap(alone, run_packed(twin, documents, gradients=False)).logits < 0.1, "a copy runs its own weights"


def test_p21_accelerate_may_unwrap_in_between() -> None:
    """P21: what it finds inside its wrapper is bound to the model once more."""
    from accelerate.utils import extract_model_from_parallel

    tiny = build("llama")
    isolate(tiny.model)
    wrap_as_accelerate_does(tiny.model)
    isolate(tiny.model)
    extract_model_from_parallel(tiny.model, keep_fp32_wrapper=False)
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents, gradients=False)
    assert gap(alone, run_packed(tiny.model, documents, gradients=False)).logits < 0.1


def test_p21_wrapped_by_ddp_between_two_isolations() -> None:
    """P21: and by torch.compile, whose module has a forward of its own."""
    tiny = build("llama")
    isolate(tiny.model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny.model)
        with isolate(wrapped):
            assert exact(wrapped, tiny.vocab_size)
        assert exact(wrapped, tiny.vocab_size)
        assert isolate(torch.compile(tiny.model, backend="eager")).backend == "varlen"
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "falcon"])
def test_p22_threads_share_an_isolated_model(name: str) -> None:
    """P22: packed training beside generation and evaluation; the config goes on naming the model's own attention."""
    tiny = build(name)
    model, own = tiny.model, tiny.model.config._attn_implementation
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(model, documents, gradients=False)
    report = isolate(model)
    errors: list[str] = []
    stop = threading.Event()

    def work(step: Any) -> None:
        while not stop.is_set() and not errors:
            try:
                step()
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")

    def packed() -> None:
        if gap(alone, run_packed(model, documents, gradients=False)).logits > 1e-5:
            errors.append("packed documents are not themselves")

    def plain() -> None:
        if gap(alone, run_alone(model, documents, gradients=False)).logits > 1e-5:
            errors.append("documents alone are not themselves")
        if model.config._attn_implementation != own:
            errors.append("the config names another attention")

    threads = [threading.Thread(target=work, args=(step,)) for step in (packed, packed, plain)]
    for thread in threads:
        thread.start()
    stop.wait(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    report.undo()
    assert model.config._attn_implementation == own
    assert gap(alone, run_alone(model, documents, gradients=False)).logits <= 1e-5


def test_what_is_installed_is_set_aside_and_back() -> None:
    tiny = build("opt")
    isolate(tiny.model)
    with set_aside(tiny.model):
        assert not exact(tiny.model, tiny.vocab_size)
    assert exact(tiny.model, tiny.vocab_size)


def test_modules_are_the_same_where_each_part_of_them_is() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    shape = [(first, first.forward.__func__, None), (second, second.forward.__func__, None)]
    assert _same(shape, list(shape))
    assert not _same(shape, shape[:1])
    assert not _same(shape, [shape[0], (second, second.forward.__func__, first)])
    assert not _same(shape, [shape[1], shape[0]])
