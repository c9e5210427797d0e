"""The packing failures that real users met (FAILURES.md), by number: each is impossible here, or stops with an error.

P8 and P9 (plan and dataset) have their tests beside the planner; P8's part in the collator is in `test_collator.py`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from sft_plugins.errors import ContaminationError, PackingError
from sft_plugins.packing import even_rows, pack_dataset, pack_stream
from sft_plugins.packing.collator import BlockDiagonalPackingCollator
from sft_plugins.packing.isolation.apply import check_isolation, isolate
from testkit.isolation_oracle import (
    gap,
    make_documents,
    make_labels,
    packed_batch,
    plain_batch,
    run_alone,
    run_packed,
    spill,
)
from testkit.leaky import LEAKS
from testkit.tiny_models import WINDOW, build

TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=2)
LENGTHS = [5, 9, 1, 17, 3, 9]


def rows_of(documents: list[torch.Tensor]) -> list[dict[str, Any]]:
    labels = make_labels(documents)
    return [{"input_ids": d.tolist(), "labels": la.tolist()} for d, la in zip(documents, labels, strict=True)]


def positions_only(documents: list[torch.Tensor]) -> dict[str, Any]:
    batch = packed_batch(documents)
    return {key: batch[key] for key in ("input_ids", "position_ids")}


@pytest.mark.parametrize("name", ["gpt_oss", "opt", "falcon", "mpt", "bloom", "afmoe", *LEAKS])
def test_p1_a_model_that_masks_without_position_ids_is_exact(name: str) -> None:
    """P1 (transformers#39997): isolated, position ids alone are enough; without any, it is one document and looks it."""
    tiny = build(name)
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents, gradients=False)
    assert gap(alone, run_packed(tiny.model, documents, gradients=False, batch=plain_batch)).logits > 1e-3
    isolate(tiny.model)
    assert gap(alone, run_packed(tiny.model, documents, gradients=False, batch=positions_only)).logits <= 1e-5
    assert spill(tiny.model, documents, 1, batch=positions_only) <= 1e-6


@pytest.mark.parametrize("mask", ["11111111", "11122333", "11111222"])
@pytest.mark.parametrize("keys", ["all", "positions"])
def test_p2_no_mask_is_emitted_and_one_that_arrives_is_exact_or_refused(mask: str, keys: str) -> None:
    """P2 (transformers#46634, axolotl#3796): segment numbers become booleans, and any mask switches detection off. A mask
    that agrees with the documents is exact, one that contradicts them is refused."""
    tiny = build("llama")
    collator = BlockDiagonalPackingCollator(TOKENIZER, model=tiny.model, rows="documents")
    documents = make_documents([3, 2, 3], tiny.vocab_size)
    batch = collator(rows_of(documents))
    assert "attention_mask" not in batch
    if keys == "positions":
        batch = {key: batch[key] for key in ("input_ids", "position_ids")}
    batch["attention_mask"] = torch.tensor([[int(number) for number in mask]])
    if mask == "11111222":
        with pytest.raises(PackingError, match=r"attention_mask (and .* )?differ") as caught:
            tiny.model(**batch)
        assert caught.value.code == "boundaries"
    else:
        alone = run_alone(tiny.model, documents, gradients=False)
        assert gap(alone, run_packed(tiny.model, documents, gradients=False, batch=lambda _: batch)).logits <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "falcon"])
def test_p3_exact_with_the_models_default_config_that_makes_a_cache(name: str) -> None:
    """P3: a cache made inside the forward switches detection off in transformers; even an explicit use_cache=True."""
    tiny = build(name)
    assert tiny.model.config.use_cache
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents, gradients=False)
    isolate(tiny.model)
    for extra in ({}, {"use_cache": True}):
        packed = run_packed(tiny.model, documents, gradients=False, batch=lambda d, e=extra: {**packed_batch(d), **e})
        assert gap(alone, packed).logits <= 1e-5
    assert tiny.model.config.use_cache, "the user's config is not changed"


def test_p4_any_number_of_packed_rows_is_one_row_with_boundaries() -> None:
    """P4 (axolotl#1230): several packed rows under FlashAttention were read as whole documents."""
    tiny = build("llama")
    documents = make_documents([5, 3, 4, 4], tiny.vocab_size)
    flat = rows_of(documents)
    packed = [
        {key: flat[a][key] + flat[a + 1][key] for key in flat[0]} | {"seq_lengths": [len(documents[a]), len(documents[a + 1])]}
        for a in (0, 2)
    ]  # fmt: skip
    batch = BlockDiagonalPackingCollator(TOKENIZER, model=tiny.model)(packed)
    assert batch["input_ids"].shape == (1, 16)
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 8, 12, 16]
    # And the two rows of somebody else's collator are exact too.
    alone = run_alone(tiny.model, documents, gradients=False)
    two = {
        "input_ids": torch.cat(documents).view(2, 8),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]),
    }
    with torch.no_grad():
        logits = tiny.model(**two).logits.flatten(0, 1)
    assert (logits - torch.cat(alone.logits)).abs().max() <= 1e-5 * max(one.abs().max() for one in alone.logits)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "jamba", "recurrent_gemma", "qwen3_next", "rwkv"])
def test_p5_no_state_leaks_through_convolutions_scans_and_delta_rules(name: str) -> None:
    """P5 (transformers#46093)."""
    tiny = build(name)
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents, gradients=False)
    isolate(tiny.model)
    assert gap(alone, run_packed(tiny.model, documents, gradients=False)).logits <= 1e-5
    assert spill(tiny.model, documents, 0) <= 1e-5


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "llama4_text"])
def test_p6_each_layer_keeps_its_own_rule_inside_its_document(name: str) -> None:
    """P6: under an explicit 4-D mask every sliding or chunked layer becomes full attention."""
    tiny = build(name)
    documents = make_documents([2 * WINDOW + 1, WINDOW, 3 * WINDOW], tiny.vocab_size)
    alone = run_alone(tiny.model, documents, gradients=False)
    isolate(tiny.model)
    assert gap(alone, run_packed(tiny.model, documents, gradients=False)).logits <= 1e-5


def test_p7_the_first_token_of_a_document_is_predicted_from_nothing() -> None:
    """P7 (trl#3692, transformers#31629): and the trainer counts exactly the tokens that padding would have trained."""
    tiny = build("llama")
    documents = make_documents(LENGTHS, tiny.vocab_size)
    rows = [
        {"input_ids": d.tolist(), "labels": d.tolist()} for d in documents
    ]  # every token carries loss, the first too
    batch = BlockDiagonalPackingCollator(TOKENIZER, model=tiny.model, rows="documents")(rows)
    assert set(batch["labels"][0, batch["cu_seq_lens_q"][:-1]].tolist()) == {-100}
    assert int((batch["labels"][:, 1:] != -100).sum()) == sum(length - 1 for length in LENGTHS)


def test_p10_rows_whose_boundaries_were_pruned_are_refused() -> None:
    """P10 (trl#3705): packed rows must not be read as single documents."""
    collator = BlockDiagonalPackingCollator(TOKENIZER, model=build("llama").model)
    with pytest.raises(PackingError, match="remove_unused_columns=False"):
        collator([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])


def test_p11_evaluation_is_isolated_by_the_same_collator() -> None:
    """P11: eval mode, no gradients, the same batches."""
    tiny = build("gpt_oss")
    documents = make_documents(LENGTHS, tiny.vocab_size)
    alone = run_alone(tiny.model, documents)
    collator = BlockDiagonalPackingCollator(TOKENIZER, model=tiny.model, rows="documents")
    batch = collator(rows_of(documents))
    tiny.model.eval()
    with torch.no_grad():
        loss = float(tiny.model(**batch).loss) * int((batch["labels"] != -100).sum())
    assert loss == pytest.approx(alone.loss, rel=1e-5)


def gradients(model: torch.nn.Module, batches: list[dict[str, Any]], count: int) -> dict[str, torch.Tensor]:
    """Gradients of one accumulation step, as Trainer scales it: each micro-batch's summed loss by all its tokens."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model(**batch, num_items_in_batch=count).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "falcon"])
def test_p12_gradients_do_not_depend_on_accumulation_or_packing(name: str) -> None:
    """P12 (trl#2604, transformers#34191): padded, packed into one row, and into four micro-batches of uneven size."""
    tiny = build(name)
    lengths = [5, 9, 2, 17, 3, 9, 12, 4]
    documents = make_documents(lengths, tiny.vocab_size)
    rows = rows_of(documents)
    width = max(lengths)
    padded = {
        key: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])
        for key, fill in (("input_ids", 0), ("labels", -100))
    }
    padded["attention_mask"] = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
    count = int((padded["labels"][:, 1:] != -100).sum())
    expected = gradients(tiny.model, [padded], count)
    collator = BlockDiagonalPackingCollator(TOKENIZER, model=tiny.model, rows="documents")
    for micro in ([8], [1, 4, 2, 1]):
        batches, at = [], 0
        for size in micro:
            batches.append(collator(rows[at : at + size]))
            at += size
        assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == count
        measured = gradients(tiny.model, batches, count)
        for key, value in expected.items():
            assert (measured[key] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-7, (micro, key)


def test_p14_a_rank_gets_rows_not_documents() -> None:
    """P14: a packed dataset is rows; any sampler deals equal numbers of them to every rank and drops none.

    Ranks go on calling the same layers in the same order whatever their rows hold, so that sharded weights never wait.
    """
    from torch.utils.data import DistributedSampler

    dataset = list(range(10))
    shares = [list(DistributedSampler(dataset, num_replicas=4, rank=rank, shuffle=False)) for rank in range(4)]
    assert len({len(share) for share in shares}) == 1
    assert set().union(*shares) == set(dataset)
    tiny = build("llama")
    isolate(tiny.model)
    calls: list[int] = []
    tiny.model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for lengths in ([30], [1] * 30, [10, 20]):
        calls.clear()
        run_packed(tiny.model, make_documents(lengths, tiny.vocab_size), gradients=False)
        counts.append(len(calls))
    assert counts == [1, 1, 1]


@pytest.mark.parametrize("variable", ["PARALLELISM_CONFIG_CP_SIZE", "PARALLELISM_CONFIG_SP_SIZE"])
def test_p15_context_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """P15 (trl#6843): when the model is isolated, and again in the forward, for a host that turns it on later."""
    tiny = build("llama")
    isolate(tiny.model)
    monkeypatch.setenv(variable, "2")
    for attempt in (
        lambda: isolate(tiny.model),
        lambda: check_isolation(tiny.model),
        lambda: tiny.model(**packed_batch(make_documents(LENGTHS, tiny.vocab_size))),
    ):
        with pytest.raises(ContaminationError, match="parallelism is on") as caught:
            attempt()
        assert caught.value.code == "context_parallel"


def test_p15_context_parallelism_of_a_running_accelerator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """P15: as `ParallelismConfig(cp_size=2)` leaves it in accelerate's shared state."""
    from accelerate.state import AcceleratorState

    state = {**AcceleratorState._shared_state, "parallelism_config": SimpleNamespace(cp_size=2, sp_size=1)}
    monkeypatch.setattr(AcceleratorState, "_shared_state", state)
    with pytest.raises(ContaminationError, match="cp_size=2"):
        isolate(build("llama").model)


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow"])
def test_p25_even_rows_takes_a_formatted_data_set_with_carried_columns_apart(kind: str) -> None:
    """P25: it was a bare ValueError, and a column that the format leaves out was lost."""
    rows = [{"input_ids": [5, 6 + i], "labels": [-100, 6 + i], "tags": ["a"] * i, "score": float(i)} for i in range(4)]
    plain = pack_dataset(Dataset.from_list(rows), 4, extra_columns="carry").dataset
    formatted = plain.with_format(kind, columns=["input_ids", "labels", "seq_lengths"])
    even = even_rows(formatted, 3)
    assert even.format == formatted.format
    assert even.with_format(None)[:] == even_rows(plain, 3)[:]
    assert sorted(score for row in even.with_format(None)["score"] for score in row) == [0.0, 1.0, 2.0, 3.0]
    transformed = even_rows(plain.with_transform(lambda batch: batch), 3)
    assert transformed.format["type"] == "custom"
    assert transformed.with_format(None)[:] == even_rows(plain, 3)[:]


def test_p25_a_boolean_attention_mask_is_read() -> None:
    """P25: the remedy was to tokenise and mask, which the rows were."""
    rows = [{"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [True, True]}]
    padded = [*rows, {"input_ids": [5, 6, 0], "labels": [-100, 6, -100], "attention_mask": [True, True, False]}]
    assert pack_dataset(Dataset.from_list(rows), 4, extra_columns="drop").report.documents == 1
    assert len(list(pack_stream(rows, 4, extra_columns="drop"))) == 1
    for pack in (lambda r: pack_dataset(Dataset.from_list(r), 8, extra_columns="drop"), lambda r: list(drop(r))):
        with pytest.raises(PackingError, match="the row is padded") as caught:
            pack(padded)
        assert (caught.value.code, caught.value.row) == ("padded_row", 1)
    words = [{"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": ["a", "b"]}]
    with pytest.raises(PackingError, match="give one 1 per token, or leave the column out"):
        pack_dataset(Dataset.from_list(words), 4, extra_columns="drop")


def drop(rows: Any) -> Any:
    return pack_stream(rows, 8, extra_columns="drop")
