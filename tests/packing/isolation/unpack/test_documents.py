"""`unpack`, and whatever `isolate` chooses, equal every document run alone, whatever its length and neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from sft_plugins.packing.isolation.backends.unpack import Unpack
from sft_plugins.packing.isolation.forward import install
from testkit.isolated import ARCHITECTURES, GRADIENTS, LENGTHS, LOGITS, WAYS
from testkit.isolation_oracle import (
    gap,
    make_documents,
    plain_batch,
    run_alone,
    run_packed,
    spill,
)
from testkit.tiny_models import WINDOW, build

SHAPES = {
    "documents of one token": [1, 1, 4, 1, 1],
    "one document fills the row": [37],
    "lengths straddle the window": [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1],
    "one long, many short": [61, 2, 3, 1, 2, 5],
    "all alike": [8, 8, 8],
    "a sum that nothing divides": [13, 24],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_row_equals_documents_run_alone(name: str, lengths: list[int], way: str) -> None:
    tiny = build(name)
    documents = make_documents(lengths, tiny.vocab_size)
    alone = run_alone(tiny.model, documents)
    WAYS[way](tiny.model)
    found = gap(alone, run_packed(tiny.model, documents))
    assert found.logits <= LOGITS, found
    assert found.loss <= LOGITS, found
    assert found.gradients <= GRADIENTS, found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changing_one_document_changes_no_other(name: str, way: str) -> None:
    tiny = build(name)
    documents = make_documents(LENGTHS, tiny.vocab_size)
    assert spill(tiny.model, documents, 0, batch=plain_batch) > 1e-3, "without isolation it must"
    WAYS[way](tiny.model)
    assert max(spill(tiny.model, documents, changed) for changed in (0, 3)) <= LOGITS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "mixtral", "jamba", "gpt_oss"])
def test_five_hundred_documents_in_a_row(name: str, way: str) -> None:
    """In double precision, where 1500 tokens leave no room to call a leak rounding."""
    tiny = build(name)
    tiny.model.set_experts_implementation("eager")  # the fused one has no double precision
    tiny.model.double()
    lengths = np.random.default_rng(0).integers(1, 6, size=500).tolist()
    documents = make_documents(lengths, tiny.vocab_size)
    alone = run_alone(tiny.model, documents, gradients=False)
    WAYS[way](tiny.model)
    assert gap(alone, run_packed(tiny.model, documents, gradients=False)).logits <= 1e-13


def test_documents_of_equal_length_need_no_mask() -> None:
    """prophetnet numbers positions wrongly in a padded batch; without padding it is exact."""
    tiny = build("prophetnet")
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents)
    undo = install(tiny.model, Unpack())
    assert gap(alone, run_packed(tiny.model, documents)).logits > 1e-3
    undo()
    install(tiny.model, Unpack(padding=False))
    found = gap(alone, run_packed(tiny.model, documents))
    assert found.logits <= LOGITS, found
    assert found.gradients <= GRADIENTS, found
