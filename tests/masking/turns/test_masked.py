"""`MaskedExample`: made of arrays or of lists, it is the same row, and lists are what it gives."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest

from sft_plugins.masking import MaskedExample, PromptMasker
from testkit.tokenizers import build_tokenizer

IDS, LABELS = [5, 6, 7], [-100, 6, 7]
AS_LISTS = MaskedExample([*IDS], [*LABELS], {"trained": 2})


def of_arrays() -> MaskedExample:
    return MaskedExample(np.array(IDS, np.int32), np.array(LABELS, np.int32), {"trained": 2})


def test_lists_are_of_python_integers_and_the_same_each_time() -> None:
    row = of_arrays()
    assert type(row.input_ids) is type(row.labels) is list
    assert {type(token) for token in (*row.input_ids, *row.labels)} == {int}
    assert (row.input_ids, row.labels) == (IDS, LABELS)
    assert row.input_ids is row.input_ids


def test_it_compares_prints_copies_and_travels_as_one_made_of_lists() -> None:
    assert of_arrays() == AS_LISTS
    assert of_arrays() != replace(AS_LISTS, labels=[-100, -100, 7])
    assert repr(of_arrays()) == repr(AS_LISTS)
    assert asdict(of_arrays()) == asdict(AS_LISTS)
    assert replace(of_arrays(), lost_tokens=3) == replace(AS_LISTS, lost_tokens=3)
    assert pickle.loads(pickle.dumps(of_arrays())) == AS_LISTS
    with pytest.raises(FrozenInstanceError):
        of_arrays().labels = []  # type: ignore[misc]
    with pytest.raises(TypeError, match="input_ids"):
        MaskedExample()


@pytest.mark.parametrize("row", [of_arrays(), AS_LISTS], ids=["arrays", "lists"])
def test_arrays_are_what_the_lists_hold_even_after_those_were_changed(row: MaskedExample) -> None:
    row = replace(row, input_ids=row.input_ids.copy())
    for tokens, expected in zip(row.arrays, (IDS, LABELS), strict=True):
        assert tokens.dtype.kind == "i"
        assert tokens.tolist() == expected
    row.input_ids.append(9)
    assert row.arrays[0].tolist() == [*IDS, 9]
    assert MaskedExample([], []).arrays[0].dtype == np.int64
    derived = type("Derived", (MaskedExample,), {})(row.input_ids, row.labels)
    assert derived.arrays[0].tolist() == [*IDS, 9]


def test_rows_of_a_batch_keep_nothing_of_their_neighbours_when_they_travel() -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": "yes " * 400}]}
        for i in range(8)
    ]
    made = [one.rows[0] for one in PromptMasker(build_tokenizer("qwen")).encode_batch(rows)]
    assert len(pickle.dumps(made[0])) < 2 * 4 * len(made[0].arrays[0]) + 4096
    assert pickle.loads(pickle.dumps(made[3])) == made[3]
