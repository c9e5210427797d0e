"""Models under DeepSpeed over two processes: isolated before ZeRO-2 or ZeRO-3 takes them, packed loss, gradients and weights
are those of one process.

The oracle is a plain model on each document alone (`worker_fsdp2.alone`), and one step of plain SGD. DeepSpeed runs on the
CPU, without its CUDA kernels (`DS_BUILD_OPS=0`).
"""

from __future__ import annotations

from typing import Any

import pytest

from testkit.optional import DEEPSPEED

pytest.importorskip("peft")

pytestmark = [pytest.mark.slow, *DEEPSPEED]

NAMES = {  # model and stage, and the backend that isolates it
    "llama, stage 2": "varlen",
    "llama, lora, stage 2": "varlen",
    "mamba, stage 2": "unpack",
    "llama, stage 3": "varlen",
    "llama, lora, stage 3": "varlen",
    "gpt_oss, lora, stage 3": "varlen",
    "llama, unpack, stage 3": "unpack",
    "mamba, stage 3": "unpack",
}


@pytest.fixture(scope="module")
def ranks(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("worker_deepspeed.py", 2, tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("name", NAMES)
def test_packed_loss_gradients_and_weights_are_those_of_documents_alone_in_one_process(
    ranks: list[dict[str, Any]], name: str
) -> None:
    for rank in ranks:
        run = rank[name]
        assert run["backend"] == NAMES[name]
        assert run["loss"] == pytest.approx(run["expected loss"], rel=1e-5)
        assert run["same parameters"]
        assert run["worst gradient"] <= 1e-4
        assert run["compared"] >= 15
        assert run["worst weight"] <= 1e-5
    assert abs(ranks[0][name]["loss"] - ranks[1][name]["loss"]) > 1e-2, "each rank has documents of its own"


@pytest.mark.parametrize("name", NAMES)
def test_stage_3_partitions_every_parameter_and_stage_2_none(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        run = rank[name]
        assert run["parameters"] > 20
        assert run["partitioned"] == (run["parameters"] if name.endswith("3") else 0)


def test_a_partitioned_model_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["partitioned before"]["code"] == "sharded"
        assert "isolate the model before it is partitioned" in rank["partitioned before"]["error"]


def test_a_decoder_that_cannot_be_padded_is_refused_where_ranks_would_wait_for_each_other(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert rank["without padding"]["code"] == "sharded"
        assert "ProphetNetDecoder runs on documents of one length at a time" in rank["without padding"]["error"]
