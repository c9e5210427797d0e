"""What docs/packing.md says of TRL's own ways, held to the installed TRL."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from sft_plugins.integrations.trl import sft_arguments
from sft_plugins.packing import BlockDiagonalPackingCollator
from sft_plugins.packing.isolation.boundaries import BOUNDARY_KEYS
from sft_plugins.packing.stream import pack_stream
from testkit.isolation_oracle import make_documents
from testkit.tiny_models import build
from testkit.tokenizers import build_tokenizer

trl = pytest.importorskip("trl")


def documents() -> list[dict[str, list[int]]]:
    rows = [ids.tolist() for ids in make_documents([5, 9, 2, 17, 3, 9, 12, 4], 96)]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in rows]


def trainer_of(tmp_path: Path, rows: Any, **more: Any) -> Any:
    tokenizer, model = build_tokenizer("qwen"), build("opt").model
    collator = more.pop("collator", None)
    common = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    more = {"max_steps": 2} | more
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**common, **more),  # type: ignore[arg-type]
        train_dataset=rows,
        data_collator=collator and BlockDiagonalPackingCollator(tokenizer, model=model),
        processing_class=tokenizer,
    )


def test_a_packed_stream_reaches_the_model_through_a_generator(tmp_path: Path) -> None:
    stream = pack_stream(documents(), 24, buffer_size=4)
    rows = IterableDataset.from_generator(lambda: iter(stream))
    arguments = sft_arguments("packed")
    trainer = trainer_of(tmp_path, rows, collator=True, per_device_train_batch_size=1, **arguments)
    lengths = [batch["cu_seq_lens_q"].diff().tolist() for batch in trainer.get_train_dataloader()]
    assert lengths == [row["seq_lengths"].tolist() for row in stream]
    assert sum(map(len, lengths)) == 8
    trainer.train()


@pytest.mark.parametrize("workers", [0, 2])
def test_p18_every_document_of_a_stream_is_trained_once_per_epoch(tmp_path: Path, workers: int) -> None:
    """P18: with two workers half of them were, in the same packs in every epoch."""
    source = Dataset.from_list(documents()).to_iterable_dataset(num_shards=4)
    stream = pack_stream(source, 24, buffer_size=100)
    packs = len(list(stream))
    rows = IterableDataset.from_generator(lambda: iter(stream))
    arguments = sft_arguments("packed") | {"max_steps": 2 * packs, "dataloader_num_workers": workers}
    trainer = trainer_of(tmp_path, rows, collator=True, per_device_train_batch_size=1, **arguments)
    trained: list[list[tuple[int, ...]]] = []

    def note(_: Any, __: Any, batch: dict[str, Any]) -> None:
        ends = batch["cu_seq_lens_q"].tolist()
        ids = batch["input_ids"][0].tolist()
        trained.append([tuple(ids[a:b]) for a, b in itertools.pairwise(ends)])

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    epochs = trained[:packs], trained[packs:]
    for epoch in epochs:
        assert sorted(ids for pack in epoch for ids in pack) == sorted(tuple(row["input_ids"]) for row in documents())
    assert epochs[0] != epochs[1]


def test_trls_own_packing_says_where_documents_begin(tmp_path: Path) -> None:
    """The strategies that README and docs/packing.md call exact once the model is isolated."""
    trainer = trainer_of(tmp_path, Dataset.from_list(documents()), packing=True, packing_strategy="bfd", max_length=24)
    assert set(next(iter(trainer.get_train_dataloader()))) & {"position_ids", *BOUNDARY_KEYS}
