"""Rows of trees: each branch equals its row alone, forward and backward, or the row is refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sft_plugins.errors import ContaminationError, PackingError
from sft_plugins.packing import isolate
from sft_plugins.packing.isolation import trees as module
from sft_plugins.packing.isolation.trees import Trees
from testkit.prefix_forest import Row, fold_slowly, forests, paths_of
from testkit.tiny_models import build
from testkit.tree_matrix import PAGE, examine_trees, flat, loss_alone, segments, summed_loss, tree_batch, trees_of


def apart(model: nn.Module, reference: nn.Module) -> float:
    """Largest difference of gradients, relative to the largest gradient of all."""
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True)]
    size = max(float(q.abs().max()) for _, q in pairs if q is not None)
    return max(float((p - q).abs().max()) for p, q in pairs if p is not None and q is not None) / size


@functools.cache
def isolated(backend: str) -> tuple[nn.Module, nn.Module]:
    """A model in float64 that takes trees, and the same as it came."""
    model = build("gpt2").model.double()  # its norms compute in float64, Llama's in float32
    reference = copy.deepcopy(model)
    assert isolate(model, backend=backend, share_prefixes=True).prefix_trees
    return model, reference


@pytest.mark.parametrize("backend", ["varlen", "unpack"])
@settings(max_examples=12, deadline=None)
@given(rows=forests())
def test_loss_and_gradients_of_a_tree_are_those_of_its_rows(backend: str, rows: list[Row]) -> None:
    model, reference = isolated(backend)
    made = fold_slowly(
        [
            ([token % 90 for token in ids], [label if label < 0 else label % 90 for label in labels])
            for ids, labels in rows
        ]
    )
    labels = flat(made, 1)
    batch = tree_batch(made)
    if (batch.get("seq_parents", torch.tensor([-1])) < 0).all():
        batch = {key: value for key, value in batch.items() if not key.startswith("seq_")}
    loss = summed_loss(model(**batch).logits[0], labels)
    expected = loss_alone(reference, paths_of(made))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    if any(label >= 0 for label in labels):
        model.zero_grad(), reference.zero_grad()
        loss.backward(), expected.backward()
        assert apart(model, reference) < 1e-9


# Windows per layer · window and sinks · chunks · learned positions · soft caps · multi-query · latent attention · a text model
# in another that makes its masks · no attention at all (unpack) · ALiBi (unpack). The others: docs/tree-matrix.md.
@pytest.mark.parametrize(
    "name",
    [
        "gemma3_text",
        "gpt_oss",
        "llama4_text",
        "opt",
        "gemma2",
        "gpt_bigcode",
        "deepseek_v3",
        "gemma3",
        "mamba",
        "bloom",
    ],
)
def test_a_row_of_trees_equals_its_rows_alone(name: str) -> None:
    found = examine_trees(name)
    assert found.exact, found
    page = PAGE.read_text(encoding="utf-8")
    assert f"| {name} | {found.backend} |" in page


def test_tokens_picked_by_score_stand_against_trees() -> None:
    """Sparse attention picks the highest scores; of equal ones another where a row is padded further."""
    assert "index_topk" in examine_trees("deepseek_v32").against


def test_gradient_checkpointing_recomputes_inside_the_tree() -> None:
    model = build("llama").model.double()
    reference = copy.deepcopy(model)
    isolate(model, share_prefixes=True)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    made = segments(90)
    loss = summed_loss(model(**tree_batch(made)).logits[0], flat(made, 1))
    expected = loss_alone(reference, paths_of(made))
    loss.backward(), expected.backward()
    assert apart(model, reference) < 1e-6  # norms in float32


def planted(name: str, fault: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(module.Trees, name, fault)


def _one_token_short(trees: Trees) -> list[np.ndarray]:
    own = [np.arange(start, start + n) for start, n in zip(trees.starts, trees.lengths, strict=True)]
    found: list[np.ndarray] = []
    for number, depth in enumerate(trees.depths):
        parent = trees.parents[number]
        before = found[parent][:depth] if parent >= 0 else own[number][:0]
        # Its first token stands where the last one that it ought to see does.
        found.append(np.concatenate((before[:-1], own[number][: min(1, len(before))], own[number])))
    return found


def _a_sibling_instead(trees: Trees) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for number, (start, length, depth) in enumerate(zip(trees.starts, trees.lengths, trees.depths, strict=True)):
        before = np.concatenate(found)[-depth:] if depth else np.array([], np.int64)
        found.append(np.concatenate((before, np.arange(start, start + length))))
        assert len(found[number]) == depth + length
    return found


@pytest.mark.parametrize("backend", ["varlen", "unpack"])
@pytest.mark.parametrize("fault", [_one_token_short, _a_sibling_instead])
def test_the_proof_sees_branches_that_see_something_else(
    fault: Callable[..., Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = module.Trees.paths
    model = build("llama").model
    with monkeypatch.context() as patched:
        patched.setattr(module.Trees, "paths", fault)
        report = isolate(model, backend=backend, share_prefixes=True)
    assert not report.prefix_trees
    assert any("trees" in note for note in report.notes)
    assert module.Trees.paths is right
    with pytest.raises(ContaminationError, match="not proved") as raised:
        model(**tree_batch(segments(90)))
    assert raised.value.code == "prefix_trees"


def test_positions_that_do_not_count_along_the_path_are_seen_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").model
    monkeypatch.setattr(module.Trees, "position_ids", module.Boundaries.position_ids)
    assert not isolate(model, share_prefixes=True).prefix_trees


def test_frequencies_of_the_whole_row_stand_against_trees() -> None:
    tiny = build("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    report = isolate(tiny.model, share_prefixes=True)
    assert not report.prefix_trees
    assert any("rotary" in note for note in report.notes)


def test_trees_are_refused_where_nobody_proved_them() -> None:
    model = build("llama").model
    isolate(model)
    with pytest.raises(ContaminationError) as raised:
        model(**tree_batch(segments(90)))
    assert raised.value.code == "prefix_trees"


@pytest.mark.parametrize("lost", [["seq_parents"], ["seq_depths"], ["seq_parents", "seq_depths"], ["cu_seq_lens_q"]])
def test_a_tree_that_loses_a_key_on_its_way_is_refused(lost: list[str]) -> None:
    model = build("llama").model
    isolate(model, share_prefixes=True)
    batch = {key: value for key, value in tree_batch(segments(90)).items() if key not in lost}
    with pytest.raises(PackingError) as raised:
        model(**batch)
    assert raised.value.code == "boundaries"


def test_keys_that_say_something_else_are_refused() -> None:
    model = build("llama").model
    isolate(model, share_prefixes=True)
    made = segments(90)
    for key, other in {
        "position_ids": torch.arange(sum(len(tokens) for tokens, *_ in made))[None],
        "cu_seq_lens_k": trees_of(made).cu_seq_lens("cpu"),
        "max_length_k": 3,
        "seq_idx": torch.zeros(1, sum(len(tokens) for tokens, *_ in made), dtype=torch.int32),
    }.items():
        with pytest.raises(PackingError, match=key):
            model(**tree_batch(made) | {key: other})
    with pytest.raises(ContaminationError, match="attention_mask"):
        model(**tree_batch(made), attention_mask=torch.zeros(1, sum(len(tokens) for tokens, *_ in made)))


@pytest.mark.parametrize(
    ("depths", "parents"),
    [
        ([0, 1, 0], [-1, 1, -1]),  # its own parent
        ([0, 1, 1], [-1, 2, 0]),  # a later one
        ([0, 4, 0], [-1, 0, -1]),  # behind the parent's last token
        ([0, 0, 2], [-1, -1, -2]),
        ([0, 2, 0], [-1, -1, -1]),  # a root in the middle
        ([0, 2, 1], [-1, 0, 1]),  # before the parent's first token
        ([0, 1], [-1, 0]),
    ],
)
def test_branches_that_hang_on_nothing_are_refused(depths: list[int], parents: list[int]) -> None:
    with pytest.raises(PackingError) as raised:
        Trees(lengths=np.array([4, 3, 3]), depths=np.array(depths), parents=np.array(parents))
    assert raised.value.code == "boundaries"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_a_branch_sees_is_its_row(data: st.DataObject) -> None:
    made = fold_slowly(data.draw(forests()))
    trees = trees_of(made)
    ids = np.array(flat(made, 0))
    for path, (row, _) in zip(trees.paths(), paths_of(made), strict=True):
        assert ids[path].tolist() == row
    seen, own = trees.seen("cpu"), trees.own("cpu")
    assert torch.equal(seen[own], torch.arange(trees.tokens))
    where = [
        g.where if isinstance(g.where, torch.Tensor) else torch.arange(trees.tokens)[g.where]
        for g in trees.groups("cpu")
    ]
    order = trees.ungroup("cpu")
    assert torch.equal(torch.cat(where) if order is None else torch.cat(where)[order], torch.arange(trees.tokens))
