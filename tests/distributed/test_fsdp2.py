"""Models sharded by FSDP2 over two processes: isolated before or after, packed loss and gradients are those of one process.

The oracle is an unsharded model on each document alone (`worker_fsdp2.alone`).
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

pytestmark = pytest.mark.slow

NAMES = {  # what was sharded, and the backend that isolates it
    "llama, isolated before": "varlen",
    "llama, isolated after": "varlen",
    "gpt_oss, isolated before": "varlen",
    "gpt_oss, isolated after": "varlen",
    "llama, lora, isolated before": "varlen",
    "llama, lora, isolated after": "varlen",
    "llama, lora, checkpointing": "varlen",
    "llama, unpack": "unpack",
    "mamba, isolated before": "unpack",
}


@pytest.fixture(scope="module")
def ranks(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("worker_fsdp2.py", 2, tmp_path_factory.mktemp("fsdp2"))


@pytest.mark.parametrize("name", NAMES)
def test_packed_loss_and_gradients_are_those_of_documents_alone_in_one_process(
    ranks: list[dict[str, Any]], name: str
) -> None:
    for rank in ranks:
        run = rank[name]
        assert (run["backend"], run["leaked"]) == (NAMES[name], 0)
        assert run["loss"] == pytest.approx(run["expected loss"], rel=1e-5)
        assert run["same parameters"]
        assert run["worst gradient"] <= 1e-4
        assert run["compared"] >= 20


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_was_sharded_and_each_rank_had_documents_of_its_own(
    ranks: list[dict[str, Any]], name: str
) -> None:
    a, b = (rank[name] for rank in ranks)
    assert a["sharded"] == a["parameters"] > 20
    assert abs(a["loss"] - b["loss"]) > 1e-2


def test_a_decoder_that_cannot_be_padded_is_refused_where_ranks_would_wait_for_each_other(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert rank["without padding"]["code"] == "sharded"
        assert "ProphetNetDecoder runs on documents of one length at a time" in rank["without padding"]["error"]


def test_the_model_beneath_the_sharded_root_is_refused_and_stays_trainable(ranks: list[dict[str, Any]]) -> None:
    """A forward beneath the root would leave FSDP2 with another root for good: training through it would fail."""
    for rank in ranks:
        assert rank["beneath the root"]["code"] == "sharded"
        assert "pass the model that fully_shard or the trainer took" in rank["beneath the root"]["error"]
