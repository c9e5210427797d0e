"""Streams of trees: within a buffer what `pack_dataset` folds, resumed in the middle as if unbroken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from datasets import Dataset, Features, IterableDataset, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_plugins.errors import PackingError
from sft_plugins.packing import PackStream, pack_dataset, pack_stream
from sft_plugins.packing.prefix_tree import buffer as module
from sft_plugins.packing.prefix_tree.fold import fold
from testkit.prefix_forest import Row, forests, paths_of, segments_of, trained


def as_rows(rows: list[Row]) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": labels} for ids, labels in rows]


def conversation(number: int) -> list[Row]:
    """Two rows of one conversation, whose history of 20 tokens is its own."""
    history = [1000 + 100 * number + i for i in range(20)]
    return [([*history, turn, 2], [-100] * 20 + [turn, 2]) for turn in (5, 6)]


ROWS = [row for number in range(6) for row in conversation(number)]


def stream(rows: list[Row], buffer_size: int, **options: Any) -> PackStream:
    return pack_stream(as_rows(rows), 64, buffer_size=buffer_size, share_prefixes=True, **options)


def paths(packed: Any) -> list[Row]:
    return [path for row in packed for path in paths_of(segments_of({k: v.tolist() for k, v in row.items()}))]


@settings(max_examples=60, deadline=None)
@given(forests(), st.integers(1, 9))
def test_every_trained_token_of_a_stream_comes_out_once(rows: list[Row], buffer_size: int) -> None:
    kept = [(ids, labels) for ids, labels in rows if set(labels) != {-100}]
    if not kept:
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "fold", lambda *a: fold(*a, least=1))
        one = stream(kept, buffer_size)
        packed = list(one)
    assert trained(paths(packed)) == trained(kept)
    report = one.report
    assert report.prefixes is not None
    assert report.documents == len(kept)
    assert report.tokens == sum(len(row["input_ids"]) for row in packed) == report.prefixes.tree_tokens
    assert report.tokens_in == report.tokens + report.prefixes.shared_tokens
    assert report.supervised_tokens == sum(trained(kept).values())


def test_one_buffer_is_what_pack_dataset_makes() -> None:
    packed, report = pack_dataset(Dataset.from_list(as_rows(ROWS)), 64, seed=None, share_prefixes=True)
    one = stream(ROWS, 100, seed=None)
    assert [{name: value.tolist() for name, value in row.items()} for row in one] == list(packed)
    assert one.report == report
    assert report.prefixes is not None
    # Rows of 22 tokens, 253 pairs each: of the second only those of its last three tokens are left, 20 + 21 + 22.
    assert report.prefixes.attention_saved == pytest.approx(1 - (253 + 63) / 506)
    assert report.to_dict()["prefixes"]["attention_saved"] == report.prefixes.attention_saved
    assert "attention saved 38%, all else 43%" in report.prefixes.line()[2]


def test_a_resumed_stream_goes_on_and_reports_as_if_unbroken() -> None:
    whole = stream(ROWS, 5)
    rows = [{name: value.tolist() for name, value in row.items()} for row in whole]
    for stop in range(1, len(rows)):
        first = stream(ROWS, 5)
        begun: Iterator[Any] = iter(first)
        for _ in range(stop):
            next(begun)
        state = json.loads(json.dumps(first.state_dict()))
        second = stream(ROWS, 5)
        second.load_state_dict(state)
        assert [{name: value.tolist() for name, value in row.items()} for row in second] == rows[stop:]
        assert second.report == whole.report


def test_a_state_of_other_sharing_is_refused_and_an_older_one_had_none() -> None:
    plain = pack_stream(as_rows(ROWS), 64, buffer_size=5)
    next(iter(plain))
    state = plain.state_dict()
    with pytest.raises(PackingError, match="share_prefixes") as caught:
        stream(ROWS, 5).load_state_dict(state)
    assert caught.value.code == "bad_state"
    del state["options"]["share_prefixes"]
    del state["place"]["tally"]["prefixes"]
    again = pack_stream(as_rows(ROWS), 64, buffer_size=5)
    again.load_state_dict(state)
    assert len(list(again)) == len(list(pack_stream(as_rows(ROWS), 64, buffer_size=5))) - 1


def test_columns_of_rows_are_refused_and_named() -> None:
    rows = as_rows(ROWS)
    rows[3]["tag"] = "a"
    with pytest.raises(PackingError, match="columns tag") as caught:
        list(pack_stream(rows, 64, share_prefixes=True, extra_columns="carry"))
    assert (caught.value.code, caught.value.row) == ("extra_columns", 3)
    assert len(list(pack_stream(rows, 64, share_prefixes=True, extra_columns="drop"))) > 0
    with pytest.raises(PackingError) as caught:
        pack_stream(rows, 64, share_prefixes="yes")  # type: ignore[arg-type]
    assert caught.value.code == "bad_option"


def test_a_stream_of_trees_goes_through_an_iterable_dataset() -> None:
    """The route of TRL."""
    columns = {
        name: List(Value("int32")) for name in ("input_ids", "labels", "seq_lengths", "seq_depths", "seq_parents")
    }
    rows = IterableDataset.from_generator(lambda: iter(stream(ROWS, 100)), features=Features(columns))
    assert trained([path for row in rows for path in paths_of(segments_of(row))]) == trained(ROWS)
