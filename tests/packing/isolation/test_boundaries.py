"""Boundaries: what a batch says about its documents, read the same whichever way it says it."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from sft_plugins.errors import ContaminationError, PackingError
from sft_plugins.packing.isolation.boundaries import BOUNDARY_KEYS, Boundaries
from sft_plugins.packing.isolation.forward import Entry, current_boundaries, install, installed_backend, set_aside
from sft_plugins.packing.isolation.reading import take_boundaries
from testkit.isolated import through_pickle
from testkit.tiny_models import build

# The worked vector: lengths 2, 4, 3.
ENDS = torch.tensor([0, 2, 6, 9], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 0, 1, 2, 3, 0, 1, 2]])
SEQ_IDX = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2]], dtype=torch.int32)
IDS = torch.arange(9)[None]


def take(**arguments: Any) -> Boundaries | None:
    return take_boundaries(arguments, rows=1, tokens=9)


@pytest.mark.parametrize(
    "given",
    [
        {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 4, "max_length_k": 4, "seq_idx": SEQ_IDX},
        {"cu_seq_lens_q": ENDS},
        {"cu_seq_lens_k": ENDS},
        {"seq_idx": SEQ_IDX},
        {"position_ids": POSITIONS},
        {"position_ids": POSITIONS + 2},
        {"position_ids": POSITIONS[None].expand(3, 1, 9)},
        {"position_ids": POSITIONS, "cu_seq_lens_q": ENDS, "attention_mask": None, "past_key_values": None},
    ],
    ids=["all", "cu_q", "cu_k", "seq_idx", "positions", "positions-from-2", "3-d", "with-nones"],
)
def test_every_way_of_saying_it_gives_the_same_documents(given: dict[str, Any]) -> None:
    arguments = {"input_ids": IDS, **given}
    boundaries = take_boundaries(arguments, rows=1, tokens=9)
    assert boundaries is not None
    assert boundaries.lengths.tolist() == [2, 4, 3]
    assert not set(BOUNDARY_KEYS) & set(arguments)
    positions = arguments["position_ids"]
    assert torch.equal(positions - positions[..., :1], POSITIONS.expand_as(positions))


def test_the_worked_vector_in_every_form() -> None:
    boundaries = Boundaries(np.array([2, 4, 3]))
    assert torch.equal(boundaries.cu_seq_lens("cpu"), ENDS)
    assert boundaries.cu_seq_lens("cpu").dtype == torch.int32
    assert torch.equal(boundaries.position_ids("cpu"), POSITIONS)
    assert torch.equal(boundaries.seq_idx("cpu"), SEQ_IDX)
    assert boundaries.max_length == 4


@pytest.mark.parametrize("lengths", [[2, 4, 3], [3, 3, 3], [3, 1, 3, 2, 1, 1, 3], [1], [5, 5, 2]])
def test_groups_laid_end_to_end_and_ungrouped_are_the_row(lengths: list[int]) -> None:
    boundaries = Boundaries(np.array(lengths))
    row = torch.arange(sum(lengths))
    groups = boundaries.groups("cpu")
    assert [group.length for group in groups] == sorted(set(lengths))
    grouped = torch.cat([row[group.where] for group in groups])
    order = boundaries.ungroup("cpu")
    assert torch.equal(grouped if order is None else grouped[order], row)
    for length, where, sees in groups:
        assert sees is where, "documents see themselves"
        documents = row[where].unflatten(0, (-1, length))
        assert set(documents[:, 0].tolist()) <= set(boundaries.starts.tolist())
        assert torch.equal(documents - documents[:, :1], torch.arange(length).expand_as(documents))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"position_ids": torch.arange(9)[None]},
        {"position_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9)},
        {"attention_mask": torch.ones(1, 9), "seq_idx": None},
        # left padding, as generation makes it: positions restart, and the mask hides what they count
        {
            "position_ids": torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4, 5]]),
            "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]),
        },
        {"position_ids": torch.arange(9).expand(3, 1, 9)},  # one position per axis of an image
    ],
    ids=["bare", "positions", "positions+mask", "mask", "left-padded", "3-d"],
)
def test_ordinary_forwards_have_no_boundaries(given: dict[str, Any]) -> None:
    assert take(input_ids=IDS, **given) is None


@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_in_which_nothing_is_seen_is_refused(rows: int) -> None:
    """No row at all, or one that the mask hides."""
    nothing = torch.zeros(rows, 9, dtype=torch.long)
    with pytest.raises(ContaminationError, match="hides every token") as caught:
        take_boundaries({"attention_mask": nothing, "position_ids": nothing}, rows=rows, tokens=9)
    assert caught.value.code == "bad_mask"


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_without_tokens_are_ordinary(rows: int) -> None:
    nothing = torch.zeros(rows, 0, dtype=torch.long)
    assert take_boundaries({"attention_mask": nothing, "position_ids": nothing}, rows=rows, tokens=0) is None


def test_several_packed_rows_are_one_run_of_documents() -> None:
    """P4: rows are read one after the other; a document ends where its row does."""
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])
    boundaries = take_boundaries({"position_ids": positions}, rows=2, tokens=4)
    assert boundaries is not None
    assert boundaries.lengths.tolist() == [2, 2, 3, 1]
    assert torch.equal(boundaries.position_ids("cpu"), positions)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 2, 6, 8])}, "from 0 to the 9 tokens"),
        ({"cu_seq_lens_q": torch.tensor([1, 2, 6, 9])}, "from 0 to the 9 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 6, 2, 9])}, "must increase"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 2, 9])}, "must increase"),
        ({"cu_seq_lens_q": ENDS, "cu_seq_lens_k": torch.tensor([0, 3, 6, 9])}, "differ"),
        ({"cu_seq_lens_q": ENDS.float()}, "1-D integers"),
        ({"cu_seq_lens_q": ENDS[None]}, "1-D integers"),
        ({"cu_seq_lens_q": ENDS, "max_length_q": 3}, "longest document has 4"),
        ({"cu_seq_lens_q": ENDS, "position_ids": torch.arange(9)[None]}, "differ: cu_seq_lens_q begins a document"),
        ({"seq_idx": SEQ_IDX[:, :8]}, "shape"),
        # neither one document nor several that begin alike
        ({"position_ids": torch.tensor([[0, 1, 2, 7, 8, 9, 3, 4, 5]])}, r"begin at positions \[0, 3, 7\]"),
    ],
)
def test_boundaries_that_contradict_the_batch_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(PackingError, match=says) as caught:
        take(input_ids=IDS, **given)
    assert caught.value.code == "boundaries"


@pytest.mark.parametrize("lengths", [[], [3, 0, 2], [3, -1], [[1, 2]]])
def test_lengths_that_are_no_documents_are_refused(lengths: list[Any]) -> None:
    with pytest.raises(PackingError, match="positive integers"):
        Boundaries(np.array(lengths, dtype=np.int64))


def test_a_document_across_two_rows_is_refused() -> None:
    with pytest.raises(PackingError, match="crosses the end"):
        Boundaries(np.array([3, 5]), rows=2)


class _Spy:
    """A backend that notes what it is given."""

    name = "spy"
    keep_keys = False

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[int], list[str]]] = []

    def open(self, module: torch.nn.Module, boundaries: Boundaries) -> Any:
        return nullcontext

    def run(self, call: Any, arguments: dict[str, Any], boundaries: Boundaries) -> Any:
        current = current_boundaries()
        assert current is boundaries
        self.seen.append((type(call.__self__).__name__, boundaries.lengths.tolist(), sorted(arguments)))
        return call(**arguments)


def packed(**extra: Any) -> dict[str, Any]:
    return {"input_ids": IDS + 4, "position_ids": POSITIONS, "cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, **extra}


def test_boundaries_reach_the_backbone_once_whichever_way_the_model_is_called() -> None:
    """HOSTS.md: the module, its `.forward` (PEFT 0.20), the backbone alone (TRL's fused head), positional arguments."""
    model, spy = build("opt").model, _Spy()
    install(model, spy)
    model(**packed())
    model.forward(**packed())
    model.model(**packed())
    batch = packed()
    model(batch.pop("input_ids"), **batch)
    # OPT's causal LM calls `model.decoder`; the base model is called by hosts.
    assert [name for name, _, _ in spy.seen] == ["OPTDecoder", "OPTDecoder", "OPTModel", "OPTDecoder"]
    assert all(lengths == [2, 4, 3] for _, lengths, _ in spy.seen)
    assert all("use_cache" in names and not set(BOUNDARY_KEYS) & set(names) for _, _, names in spy.seen)
    assert current_boundaries() is None


def test_forwards_without_boundaries_pass_the_backend_by() -> None:
    model, spy = build("llama").model, _Spy()
    install(model, spy)
    model(input_ids=IDS + 4)
    model(input_ids=IDS + 4, attention_mask=torch.ones(1, 9))
    model.generate(IDS + 4, max_new_tokens=3, do_sample=False)
    assert spy.seen == []


def test_boundaries_are_gone_after_a_forward_that_fails() -> None:
    model = build("llama").model

    class Failing(_Spy):
        def run(self, call: Any, arguments: dict[str, Any], boundaries: Boundaries) -> Any:
            raise RuntimeError("on purpose")

    install(model, Failing())
    with pytest.raises(RuntimeError, match="on purpose"):
        model(**packed())
    assert current_boundaries() is None


def test_another_models_forward_inside_has_boundaries_of_its_own() -> None:
    outer, inner, spy = build("llama").model, build("llama", seed=1).model, _Spy()
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)

    class Asking(_Spy):
        def run(self, call: Any, arguments: dict[str, Any], boundaries: Boundaries) -> Any:
            inner(input_ids=IDS + 4, cu_seq_lens_q=ends)
            assert current_boundaries() is boundaries
            return super().run(call, arguments, boundaries)

    asking = Asking()
    install(outer, asking)
    install(inner, spy)
    outer(**packed())
    assert spy.seen[0][1] == [4, 5]
    assert asking.seen[0][1] == [2, 4, 3]


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_of_the_model_runs_its_own_weights(copied: Any) -> None:
    model = build("llama").model
    install(model, _Spy())
    twin = copied(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert twin(**packed()).logits.abs().max() == 0
        assert model(**packed()).logits.abs().max() > 0
    assert installed_backend(twin) is not None
    with set_aside(twin):
        assert installed_backend(model) is not None


def test_a_model_that_0_1_0_isolated_and_pickled_is_refused() -> None:
    entry = Entry.__new__(Entry)  # as 0.1.0 had it: one backend, no layers
    entry.__dict__.update(module=None, model=None, backend=None, previous=None)
    with pytest.raises(ContaminationError) as caught:
        pickle.loads(pickle.dumps(entry))
    assert caught.value.code == "not_isolated"
    assert "save_pretrained" in caught.value.remedy


def test_taking_off_leaves_no_trace_even_under_a_hosts_wrapper() -> None:
    model, spy = build("llama").model, _Spy()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    undo = install(model, spy)
    undo()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    undo = install(model, spy)
    entry = model.forward
    model.forward = lambda **kwargs: entry(**kwargs)  # what a host does that patches the forward
    undo()
    model(**{**packed(), "use_cache": False})
    assert spy.seen == []


def test_a_filled_cache_with_boundaries_is_refused() -> None:
    """P3, the other way round: documents cannot continue what a cache holds."""
    model = build("llama").model
    install(model, _Spy())
    cache = model(input_ids=IDS + 4, use_cache=True).past_key_values
    with pytest.raises(ContaminationError, match="past_key_values") as caught:
        model(**packed(past_key_values=cache))
    assert caught.value.code == "cache_with_boundaries"
