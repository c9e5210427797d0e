"""`eval_loss` in one process and in two: what TRL averages, and that ours enters it document by document.

The oracle is the documents alone: Σ loss ÷ Σ tokens of each batch, and the mean of that over batches. TRL 1.16 takes the
batch of one process for it, TRL 1.9 the batch of all processes together.
"""

from __future__ import annotations

from typing import Any

import pytest
from packaging.version import Version

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.slow

OF_ALL_RANKS = Version(trl.__version__) < Version("1.16")
"""Whether the loss of a batch is divided by the tokens of all ranks; of the versions tested, in 1.9."""
Run = dict[str, Any]


@pytest.fixture(scope="module")
def one(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return launch("worker_evaluation.py", 1, tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def two(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return launch("worker_evaluation.py", 2, tmp_path_factory.mktemp("two"))


def expected(run: Run, name: str, size: int) -> float:
    """Mean over batches of `size` rows of the mean over their supervised tokens."""
    rows = run[name]["rows"]
    means = []
    for start in range(0, len(rows), size):
        batch = [run["alone"][document] for row in rows[start : start + size] for document in row]
        means.append(sum(loss for loss, _ in batch) / sum(tokens for _, tokens in batch))
    return sum(means) / len(means)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["masked", "packed"])
def test_where_rows_come_out_even_the_loss_is_that_of_documents_alone(
    one: Run, two: list[Run], name: str, batch: int
) -> None:
    assert len(one[name]["rows"]) % 4 == 0
    assert one[name]["losses"][str(batch)] == pytest.approx(expected(one, name, batch), rel=1e-6)
    together = 2 * batch if OF_ALL_RANKS else batch
    for rank in two:
        assert rank[name]["losses"][str(batch)] == pytest.approx(expected(one, name, together), rel=1e-6)
    assert abs(expected(one, name, 1) / expected(one, name, 2) - 1) > 1e-4, (
        "sizes that make no difference prove nothing"
    )


@pytest.mark.parametrize("name", ["masked, uneven", "packed, uneven"])
def test_one_row_per_process_and_batch_needs_no_even_rows_where_each_process_divides_by_its_own_tokens(
    one: Run, two: list[Run], name: str
) -> None:
    assert len(one[name]["rows"]) % 2 == 1
    assert one[name]["losses"]["1"] == pytest.approx(expected(one, name, 1), rel=1e-6)
    if OF_ALL_RANKS:
        pytest.skip("this TRL divides by the tokens of all processes")
    for rank in two:
        assert rank[name]["losses"]["1"] == pytest.approx(expected(one, name, 1), rel=1e-6)
