"""Whoever reads packed rows takes trees apart into the rows that they stand for, or refuses them by name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from hypothesis import assume, given, settings

from sft_plugins.cli.inspect import goes_on
from sft_plugins.cli.ui.rows import RowReader
from sft_plugins.errors import MaskingError, PackingError
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator, check_masks, label_arrays
from sft_plugins.masking.examples.tokenized import documents_of
from sft_plugins.packing import BlockDiagonalPackingCollator, even_rows, pack_dataset, pack_stream
from sft_plugins.packing import dataset as module
from sft_plugins.packing.isolation import apply
from sft_plugins.packing.isolation.backends.varlen import Varlen
from sft_plugins.packing.prefix_tree.fold import fold
from sft_plugins.preflight import document_spans, segments_of
from testkit.commands import invoke
from testkit.conversations import assistant, user
from testkit.prefix_forest import Row, forests, paths_of, trained
from testkit.prefix_forest import segments_of as segments_by_hand
from testkit.tiny_models import build
from testkit.tokenizers import tokenizer_for_template

QUESTIONS = ("What makes a day good?", "And a night?", "Which of them is longer, then?")


def conversation(*thoughts: str, key: str = "reasoning_content") -> dict[str, Any]:
    """Turns whose answers came with these thoughts, which Qwen 3's and gpt-oss' templates strip from the history."""
    turns = zip(QUESTIONS, thoughts, strict=False)
    return {
        "messages": [
            message
            for question, thought in turns
            for message in (
                user(question),
                assistant("So it is.", **({key: thought} if thought else {})),
            )
        ]
    }


def split_and_packed(template: str, *rows: dict[str, Any], least: int = 2) -> tuple[list[dict[str, Any]], Dataset, Any]:
    tokenizer = tokenizer_for_template(template)
    made = [
        {"input_ids": list(one.input_ids), "labels": list(one.labels)}
        for row in rows
        for one in PromptMasker(tokenizer).encode(row)
    ]
    with patch.object(module, "fold", partial(fold, least=least)):
        packed = pack_dataset(Dataset.from_list(made), 4096, share_prefixes=True).dataset
    return made, packed, tokenizer


@settings(max_examples=150, deadline=None)
@given(forests())
def test_documents_of_a_tree_hold_every_label_of_its_rows_once(rows: list[Row]) -> None:
    kept = [(ids, labels) for ids, labels in rows if set(labels) != {-100}]
    assume(kept)
    data = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in kept])
    with patch.object(module, "fold", partial(fold, least=1)):
        packed = pack_dataset(data, 4096, share_prefixes=True).dataset
    documents = [document for row in packed for document in documents_of(row)]
    assert trained([(ids.tolist(), labels.tolist()) for ids, labels, _ in documents]) == trained(kept)
    paths = [path for row in packed for path in paths_of(segments_by_hand(row))]
    assert [ids.tolist() for ids, *_ in documents] == [ids for ids, _ in paths]
    assert all(labels[0] == -100 for _, labels, _ in documents)
    for _, labels, elsewhere in documents:
        assert elsewhere <= bool((labels == -100).all())


def test_a_document_without_labels_is_no_branch_whose_labels_stand_elsewhere() -> None:
    """Two rows of data, the second of which trains in what it shares with the first; beside them one that trains nothing."""
    tree = {"input_ids": [1, 2, 3, 2, 4], "labels": [-100, 2, 3, -100, -100], "seq_lengths": [3, 3]}
    tree |= {"seq_depths": [0, 1], "seq_parents": [-1, 0]}
    plain = {"input_ids": [1, 2, 3], "labels": [-100] * 3, "seq_lengths": [3]}
    assert [document.trained_elsewhere for document in documents_of(tree)] == [False, True]
    assert [document.trained_elsewhere for document in documents_of(plain)] == [False]


@pytest.mark.parametrize("template", ["qwen3", "gptoss"])
@pytest.mark.parametrize("thoughts", [("Let me see.", "Hm.", "Well."), ("", "", ""), ("", "Hm.", "")])
def test_an_audit_of_trees_says_of_a_split_history_what_one_of_its_rows_says(
    template: str, thoughts: tuple[str, ...]
) -> None:
    # transformers 5.16 shows a template reasoning under the name alone that it was given.
    row = conversation(*thoughts, key="thinking" if template == "gptoss" else "reasoning_content")
    made, packed, tokenizer = split_and_packed(template, row)
    alone, together = check_masks(made, tokenizer), check_masks(packed, tokenizer)
    assert {c: f.count for c, f in together.failures.items()} == {c: f.count for c, f in alone.failures.items()}
    assert together.ok
    assert together.supervised_tokens == alone.supervised_tokens
    assert together.stop_tokens == alone.stop_tokens
    assert len(packed["input_ids"][0]) < alone.tokens
    assert together.tokens <= alone.tokens, "what another row holds whole has no document of its own"
    assert any("share tokens (trees)" in note for note in together.notes)


def test_a_fault_of_a_branch_is_found_and_named_by_its_document() -> None:
    """An answer without its stop token, one that no row trains, one with a header inside: seen in a tree as in a row."""
    made, packed, tokenizer = split_and_packed("qwen3", conversation("Let me see.", "Hm.", "Well."))
    (row,) = packed
    last = max(i for i, label in enumerate(row["labels"]) if label != -100)
    (found,) = check_masks(
        [row | {"labels": [*row["labels"][:last], -100, *row["labels"][last + 1 :]]}], tokenizer
    ).failures.items()
    assert found[0] == "missing_stop"
    assert found[1].first_documents == [len(row["seq_lengths"]) - 1]
    del made[1]  # the second answer, which the third row holds untrained
    without = pack_dataset(Dataset.from_list(made), 4096, share_prefixes=True).dataset
    assert (
        check_masks(without, tokenizer).failures.keys()
        == check_masks(made, tokenizer).failures.keys()
        == {"unsupervised_turn"}
    )


def test_inspect_shows_a_branch_with_what_it_goes_on_from() -> None:
    _, packed, tokenizer = split_and_packed("qwen3", conversation("Let me see.", "Hm.", "Well."))
    (row,) = packed
    (shown,) = RowReader(PromptMasker(tokenizer)).read(row, 0)
    assert shown.faults == []
    assert shown.ids == row["input_ids"]
    segments = segments_by_hand(row)
    assert [end - start for start, end in shown.documents] == [len(tokens) for tokens, *_ in segments]
    paths = [ids for ids, _ in paths_of(segments)]
    for number, ((start, end), (_, _, parent, depth)) in enumerate(zip(shown.documents, segments, strict=True)):
        assert shown.shared(number) == (None if parent < 0 else (parent, depth + 1))
        seen = [shown.ids[i] for a, b in shown.sees(number) for i in range(a, b)] + shown.ids[start:end]
        assert seen == paths[number]
        whole = tokenizer.decode(seen)
        assert whole.endswith("".join(shown.texts[start:end]))
    branch = next(i for i, (_, _, parent, _) in enumerate(segments) if parent >= 0)
    assert (
        goes_on(shown, branch)
        == f", behind the first {segments[branch][3] + 1:,} tokens of document {segments[branch][2] + 1}"
    )
    assert goes_on(shown, 0) == ""


def test_the_commands_show_and_audit_trees(tmp_path: Path) -> None:
    _, packed, tokenizer = split_and_packed("qwen3", conversation("Let me see.", "Hm.", "Well."))
    tokenizer.save_pretrained(tmp_path / "model")
    packed.save_to_disk(str(tmp_path / "packed"))
    arguments = (tmp_path / "packed", "--model", tmp_path / "model")
    said = invoke("inspect", *arguments)
    assert said.exit_code == 0, said.stdout
    assert "── document 2 of 3, behind the first " in said.stdout
    page = tmp_path / "rows.html"
    assert invoke("inspect", *arguments, "--html", page).exit_code == 0
    assert "<rect x=" in page.read_text(encoding="utf-8")
    assert "behind the first" in page.read_text(encoding="utf-8")
    audited = invoke("audit", *arguments)
    assert audited.exit_code == 0, audited.stdout
    pruned = packed.remove_columns(["seq_parents", "seq_depths"])
    pruned.save_to_disk(str(tmp_path / "pruned"))
    for command in ("inspect", "audit"):
        lost = invoke(command, tmp_path / "pruned", "--model", tmp_path / "model")
        assert lost.exit_code == 1
        assert "boundaries" in lost.stdout


def test_who_takes_single_documents_refuses_a_tree_whatever_column_is_left() -> None:
    """Never as one document: a host may prune `seq_lengths` and leave what says where branches begin."""
    _, packed, tokenizer = split_and_packed("qwen3", conversation("Let me see.", "Hm.", "Well."))
    model = build("llama", vocab_size=len(tokenizer)).model
    flatten = BlockDiagonalPackingCollator(tokenizer, model=model, rows="documents")
    for kept in ("seq_lengths", "seq_depths", "seq_parents"):
        rows = packed.select_columns(["input_ids", "labels", kept])
        for read in (
            lambda rows: StrictPromptMaskingCollator(tokenizer)([rows[0]]),
            lambda rows: flatten([rows[0]]),
            lambda rows: pack_dataset(rows, 4096),
            lambda rows: next(iter(pack_stream(rows, 4096))),
            lambda rows: PromptMasker(tokenizer).encode(rows[0]),
        ):
            with pytest.raises((MaskingError, PackingError)) as caught:
                read(rows)
            assert caught.value.code == "already_packed"
        failures = check_masks(rows, tokenizer).failures
        assert failures.keys() == ({"boundaries"} if kept == "seq_lengths" else {"already_packed"})
        assert segments_of(rows[0], label_arrays(rows[0])[0]) is None
    with pytest.raises(MaskingError, match="trees"):
        document_spans(packed[0])


def test_rows_packed_without_trees_stand_beside_those_with_them() -> None:
    """Rows of earlier versions have no such columns, or, put together with others, nulls in them."""
    made, packed, tokenizer = split_and_packed("qwen3", conversation("Let me see.", "Hm.", "Well."))
    older = pack_dataset(Dataset.from_list(made), 4096).dataset
    joined = concatenate_datasets([older, packed])
    assert joined["seq_parents"][0] is None
    model = build("llama", vocab_size=len(tokenizer)).model
    collate = BlockDiagonalPackingCollator(tokenizer, model=model)
    both, apart = collate(list(joined)), collate([older[0], packed[0]])
    assert both.keys() == apart.keys()
    assert all(torch.equal(torch.as_tensor(both[name]), torch.as_tensor(apart[name])) for name in both)
    assert both["seq_parents"].tolist()[: len(older[0]["seq_lengths"])] == [-1] * len(made)
    alone = check_masks(made, tokenizer)
    assert check_masks(joined, tokenizer).supervised_tokens == 2 * alone.supervised_tokens
    with pytest.raises(PackingError) as caught:
        even_rows(joined, 4)
    assert caught.value.code == "bad_schema"
    tree = {**packed[0], "seq_parents": None, "seq_depths": None}
    with pytest.raises(PackingError) as caught:
        collate([tree])
    assert caught.value.code == "boundaries"


def test_a_backend_that_cannot_hold_trees_says_so_when_it_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own kernels read where documents end, and know of no paths."""
    _, packed, tokenizer = split_and_packed("qwen3", conversation("Let me see.", "Hm.", "Well."))
    model = build("llama", vocab_size=len(tokenizer)).model
    monkeypatch.setattr(apply, "_candidates", lambda *_: [Varlen(keep_keys=True)])
    collate = BlockDiagonalPackingCollator(tokenizer, model=model)
    assert not collate.isolation.prefix_trees
    assert "no trees (share_prefixes): the model's own kernels know of no paths" in str(collate.isolation)
    with pytest.raises(PackingError, match="the row holds trees") as caught:
        collate([packed[0]])
    assert (caught.value.code, caught.value.row) == ("prefix_trees", 0)
    assert "share_prefixes=False" in str(caught.value)
    older = {**packed[0], "seq_lengths": [len(packed[0]["input_ids"])], "seq_parents": [-1], "seq_depths": [0]}
    assert "seq_parents" not in collate([older]), "a row without branches is one of documents"
