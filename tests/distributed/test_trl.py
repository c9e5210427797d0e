"""Two processes through TRL train what one process trains: the same documents, each once, the same loss, the same weights.

Runs with a global batch of 4 rows, first in one process, then in two (`worker_trl.py`); the one process is the oracle, and
what it should have trained on is counted here. Runs on the oldest and the newest supported TRL.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import pytest

pytest.importorskip("trl")

pytestmark = pytest.mark.slow

DOCUMENTS = {  # name of a run → documents it should see, epochs
    "masked": (40, 2),
    "packed": (80, 2),
    "packed, accumulated": (80, 1),
    "unpack": (80, 1),
    "stream": (80, 1),
}
Run = dict[str, Any]


@pytest.fixture(scope="module")
def one(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch("worker_trl.py", 1, tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def two(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("worker_trl.py", 2, tmp_path_factory.mktemp("two"))


def together(ranks: list[Run]) -> list[list[int]]:
    """Documents of each micro-batch of all ranks together."""
    return [sorted(chain.from_iterable(batches)) for batches in zip(*(rank["seen"] for rank in ranks), strict=True)]


def counts(ranks: list[Run]) -> dict[int, int]:
    return Counter(document for batch in together(ranks) for document in batch)


def assert_same_training(alone: Run, ranks: list[Run], *, steps: int | None = None) -> None:
    """Every micro-batch's documents and loss, and the weights in the end, which all ranks share."""
    assert together(ranks)[:steps] == together([alone])[:steps]
    losses = [sum(each) / len(ranks) for each in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert losses[:steps] == pytest.approx(alone["losses"][:steps], rel=1e-6)
    for rank in ranks:
        assert rank["logged"][:steps] == pytest.approx(alone["logged"][:steps], rel=1e-6)
        assert rank["weights"] == ranks[0]["weights"]
    if steps is None:
        for name, weight in alone["weights"].items():
            assert ranks[0]["weights"][name] == pytest.approx(weight, abs=1e-6), name


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_document_is_trained_once_per_epoch(two: list[dict[str, Any]], name: str) -> None:
    """P14: nothing dropped and nothing repeated, where rows come out even."""
    expected, epochs = DOCUMENTS[name]
    ranks = [rank[name] for rank in two]
    assert counts(ranks) == dict.fromkeys(range(expected), epochs)
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert {rank["parallel"] for rank in ranks} == {"DistributedDataParallel"}
    assert all(not set(a) & set(b) for a, b in zip(*(rank["seen"] for rank in ranks), strict=True))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_rank_waits_for_another_at_the_end(two: list[dict[str, Any]], name: str) -> None:
    """P14: equally many steps and micro-batches."""
    a, b = (rank[name] for rank in two)
    assert a["steps"] == b["steps"] > 1
    assert len(a["seen"]) == len(b["seen"]) >= a["steps"]


@pytest.mark.parametrize("name", [*DOCUMENTS, "trees"])
def test_loss_and_weights_are_those_of_one_process(one: dict[str, Any], two: list[dict[str, Any]], name: str) -> None:
    assert_same_training(one[name], [rank[name] for rank in two])
    moved = [abs(a - b) for a, b in zip(one[name]["losses"], one[name]["losses"][1:], strict=False)]
    assert max(moved) > 1e-2, "losses that do not change would prove nothing"


@pytest.mark.parametrize(("name", "documents"), [("masked, uneven", 41), ("packed, uneven", 80)])
def test_of_uneven_rows_nothing_is_dropped_and_all_but_the_last_step_is_as_in_one_process(
    one: dict[str, Any], two: list[dict[str, Any]], name: str, documents: int
) -> None:
    """P14: what accelerate 1.13 and 1.15 do with the last step, `docs/many-processes.md` says: they repeat the first rows."""
    ranks = [rank[name] for rank in two]
    full = len(together(ranks)) - 1
    assert_same_training(one[name], ranks, steps=full)
    count = counts(ranks)
    assert sorted(count) == list(range(documents)), "nothing is dropped"
    again = {document for document, times in count.items() if times > 1}
    assert again <= set(together(ranks)[-1])
    assert counts([one[name]]) == dict.fromkeys(range(documents), 1), "one process ends with a smaller batch"


def test_even_rows_are_needed_for_the_packed_rows_of_these_tests(two: list[dict[str, Any]]) -> None:
    """What the runs `packed` and `packed, uneven` differ in."""
    assert (two[0]["rows"], two[0]["even rows"]) == (27, 28)


def test_dealt_rows_reach_the_ranks_and_steps_that_they_were_dealt_to(one: Run, two: list[Run]) -> None:
    """P14: every document once per epoch, row by row where the dealing put it, each epoch in the same order."""
    for ranks in ([one], two):
        rows, batch = ranks[0]["dealt rows"], 2
        assert sorted(number for row in rows for number, _ in row) == list(range(80))
        for rank, run in enumerate(ranks):
            assert run["dealt rows"] == rows, "all ranks deal alike"
            starts = range(rank * batch, len(rows), len(ranks) * batch)
            promised = [[number for row in rows[start : start + batch] for number, _ in row] for start in starts]
            assert run["dealt"]["seen"] == 2 * promised


def test_ranks_wait_as_little_as_the_report_of_the_dealing_says(two: list[Run]) -> None:
    """A rank's cost in a step is counted on what it trained on: 5 · Σ l + Σ l², summed over the step's 2 micro-batches."""
    report = two[0]["dealt report"]
    cost = {number: 5 * length + length**2 for row in two[0]["dealt rows"] for number, length in row}
    of_ranks = [[sum(map(cost.__getitem__, batch)) for batch in rank["dealt"]["seen"]] for rank in two]
    epoch = [costs[: len(costs) // 2] for costs in of_ranks]
    steps = [[sum(costs[k : k + 2]) for k in range(0, len(costs), 2)] for costs in epoch]
    slowest = sum(max(each) for each in zip(*steps, strict=True))
    assert len(steps[0]) == report["steps"] == 4
    assert two[0]["dealt"]["steps"] == 2 * report["steps"]
    assert 1 - sum(map(sum, steps)) / (2 * slowest) == pytest.approx(report["idle_dealt"], abs=1e-12)
    assert 0 < report["idle_dealt"] < report["idle_shuffled"] / 2
    assert report["repeated"] == 0


def test_a_run_resumed_from_a_checkpoint_ends_as_the_unbroken_one(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    """Bit for bit on every rank, in the middle of the second epoch, with dropout on and Adam's state to restore."""
    for rank in [one, *two]:
        unbroken, resumed = rank["unbroken"], rank["resumed"]
        assert (resumed["steps"], len(resumed["losses"])) == (14, 5)
        assert resumed["seen"] == unbroken["seen"][9:]
        assert resumed["losses"] == unbroken["losses"][9:]
        assert resumed["weights"] == unbroken["weights"]
    assert two[0]["resumed"]["losses"] != two[1]["resumed"]["losses"], "the ranks draw their own dropout"


def test_a_packed_stream_in_the_plain_trainer_needs_dispatch_batches_off(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    ranks = [rank["plain stream"] for rank in two]
    assert_same_training(one["plain stream"], ranks)
    assert set(counts(ranks).values()) == {1}
    for rank in two:
        assert "RuntimeError" in rank["plain stream, dispatched"]["error"]
    assert "`dispatch_batches=False`" in two[0]["plain stream, dispatched"]["error"]


def test_a_resumed_stream_goes_on_where_it_stopped(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for rank in [one, *two]:
        unbroken, resumed = rank["plain stream"], rank["plain stream, resumed"]
        assert resumed["seen"] == unbroken["seen"][4:]
        assert resumed["losses"] == unbroken["losses"][4:]
        assert resumed["weights"] == unbroken["weights"]


def test_a_stream_whose_column_is_pruned_stops_on_every_rank(two: list[dict[str, Any]]) -> None:
    """P10: the plain trainer takes `seq_lengths` away from streams too, and no rank reads packed rows as documents."""
    for rank in two:
        assert "remove_unused_columns=False keeps the column" in rank["plain stream, pruned"]["error"]
