"""Frequencies that follow the longest position of a row: each document gets its own, whatever it shares a row with."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLTextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from sft_plugins._preserve import untouched
from sft_plugins.packing.isolation.apply import isolate
from sft_plugins.packing.isolation.backends.rotary import PerDocument, looks_at_the_row, start_afresh
from sft_plugins.packing.isolation.boundaries import Boundaries
from testkit.isolation_oracle import Run, gap, make_documents, packed_batch, run_alone, run_packed
from testkit.tiny_models import Tiny, build

ORIGINAL = 16
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [3.0, 4.0, 6.0, 9.0], "factor": 8.0}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL, **FACTORS}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {"original_max_position_embeddings": ORIGINAL, **FACTORS},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
FOLLOW_THE_ROW = {"dynamic", "longrope"}


def scaled(name: str, rope_type: str, **changes: Any) -> Tiny:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **SCALINGS[rope_type], **changes}
    most = ORIGINAL if rope_type == "dynamic" else 8 * ORIGINAL
    original = {"original_max_position_embeddings": ORIGINAL} if name.startswith("phi") else {}
    return build(name, rope_parameters=rope, max_position_embeddings=most, **original)


def alone(model: torch.nn.Module, documents: list[torch.Tensor]) -> Run:
    """Each document by a model that has seen none: dynamic scaling, once grown, stays grown for the next document."""
    model.register_forward_pre_hook(lambda module, _: start_afresh(module))
    expected = run_alone(model, documents)
    model._forward_pre_hooks.clear()
    return expected


@pytest.mark.parametrize("backend", ["varlen", "unpack"])
@pytest.mark.parametrize("lengths", [[30, 10, 8], [18, 15], [30, 18, 3, 40, 18]], ids=str)
@pytest.mark.parametrize(("name", "rope_type"), [("phi3", "longrope"), ("phimoe", "longrope"), ("llama", "dynamic")])
def test_p19_each_document_gets_its_own_frequencies(
    name: str, rope_type: str, lengths: list[int], backend: str
) -> None:
    """P19: one document beyond the original length gave all others of its row the long factors (0.3 to 0.4)."""
    mscale = {"short_mscale": 1.1, "long_mscale": 1.3} if name == "phimoe" else {}
    tiny = scaled(name, rope_type, **mscale)
    documents = make_documents(lengths, tiny.vocab_size)
    expected = alone(tiny.model, documents)
    isolate(tiny.model, backend=backend)
    found = gap(expected, run_packed(tiny.model, documents))
    assert found.logits <= 1e-5, found
    assert found.gradients <= 1e-4, found


def test_p19_every_scaling_of_transformers_is_known() -> None:
    """P19: which scalings follow the row is asked of the module itself; the table above has every type there is."""
    assert set(ROPE_INIT_FUNCTIONS) <= set(SCALINGS)
    for rope_type in ("default", *ROPE_INIT_FUNCTIONS):
        rotary = scaled("llama", rope_type).model.model.rotary_emb
        assert looks_at_the_row(rotary) == (rope_type in FOLLOW_THE_ROW), rope_type


def test_kinds_of_layers_with_frequencies_of_their_own() -> None:
    """Gemma 3 has a rotary per kind of layer in one module; several rows, and positions of three axes, are no matter."""
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    rope = {"sliding_attention": linear, "full_attention": dynamic}
    tiny = build("gemma3_text", rope_parameters=rope, max_position_embeddings=ORIGINAL)
    documents = make_documents([30, 10, 8], tiny.vocab_size)
    expected = alone(tiny.model, documents)
    isolate(tiny.model)
    assert gap(expected, run_packed(tiny.model, documents)).gradients <= 1e-4
    rows = [documents[:1], [*documents[1:], make_documents([12], tiny.vocab_size, seed=1)[0]]]
    parts = [packed_batch(row) for row in rows]
    batch = {key: torch.cat([part[key] for part in parts]) for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        logits = tiny.model(**batch).logits
    assert (logits[0] - expected.logits[0]).abs().max() <= 1e-5 * expected.logits[0].abs().max()
    assert (logits[1, :10] - expected.logits[1]).abs().max() <= 1e-5 * expected.logits[1].abs().max()


def test_packed_rows_leave_no_trace_in_what_grows() -> None:
    """Neither the proof nor a packed row: a model that has grown says afterwards of a short document what it said before."""
    model = scaled("llama", "dynamic").model
    rotary = model.model.rotary_emb
    documents = make_documents([30, 18, 3], 96)
    model(input_ids=documents[0][None])
    before = copy.deepcopy((rotary.inv_freq, int(rotary.max_seq_len_cached)))
    report = isolate(model)
    with torch.no_grad():
        model(**packed_batch(documents))
    assert torch.equal(rotary.inv_freq, before[0])
    assert int(rotary.max_seq_len_cached) == before[1] == 30
    report.undo()
    assert "forward" not in vars(rotary)
    with untouched(model):
        model(input_ids=documents[2][None])
    assert int(rotary.max_seq_len_cached) == 30


def test_a_copy_of_an_isolated_model_uses_its_own_frequencies() -> None:
    tiny = scaled("llama", "longrope")
    documents = make_documents([30, 10, 8], tiny.vocab_size)
    expected = alone(tiny.model, documents)
    isolate(tiny.model)
    twin = copy.deepcopy(tiny.model)
    tiny.model.model.rotary_emb.inv_freq.zero_()
    assert gap(expected, run_packed(twin, documents)).logits <= 1e-5


def test_a_table_of_frequencies_that_ends_is_no_matter() -> None:
    """GPT-J looks its frequencies up: beyond the table there is nothing to ask."""
    tiny = build("gptj")
    documents = make_documents([9, 4], tiny.vocab_size)
    expected = run_alone(tiny.model, documents)
    isolate(tiny.model)
    assert gap(expected, run_packed(tiny.model, documents)).logits <= 1e-5


@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_p19_positions_of_three_axes(rope_type: str) -> None:
    """P19: the rotary of models that read images takes a position for each axis, in text three alike."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **SCALINGS[rope_type]}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = Qwen2_5_VLTextConfig(**sizes, max_position_embeddings=ORIGINAL, rope_parameters=rope)
    rotary = Qwen2_5_VLRotaryEmbedding(config)
    start_afresh(rotary)
    said = [
        Qwen2_5_VLRotaryEmbedding(config)(torch.zeros(1, len(places), 8), torch.tensor(places).expand(3, 1, -1))[0]
        for places in ([0, 1, 2, 3], [0, 1, 2, 3, 2 * ORIGINAL])
    ]
    follows = not torch.equal(said[0], said[1][..., :4, :])  # under transformers 5.16 no scaling does in this module
    assert not (follows and rope_type == "default")
    assert looks_at_the_row(rotary) == follows
    boundaries = Boundaries(np.array([30, 10, 8]))
    positions = boundaries.position_ids("cpu").expand(3, 1, 48)
    packed, _ = PerDocument(rotary, lambda: boundaries)(torch.zeros(1, 48, 8), positions)
    for start, length in zip(boundaries.starts, boundaries.lengths, strict=True):
        fresh = Qwen2_5_VLRotaryEmbedding(config)
        expected, _ = fresh(torch.zeros(1, length, 8), torch.arange(length).expand(3, 1, length))
        assert torch.equal(packed[..., start : start + length, :], expected)
