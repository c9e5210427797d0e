"""Rows of `sft-plugins mask --to verl` for verl's SFT trainer, which knows conversations alone. torch and pyarrow suffice.

    sft-plugins mask conversations.jsonl --model ./model --output masked --to verl
    torchrun --standalone --nproc_per_node=1 -m verl.trainer.sft_trainer model.path=./model data.train_files=masked/rows \
      data.pad_mode=no_padding data.custom_cls.path=configs/verl_rows.py data.custom_cls.name=MaskedRows
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset


class MaskedRows(Dataset):
    """What `MultiTurnSFTDataset` gives under `pad_mode=no_padding`: input_ids, position_ids, loss_mask, int64 `[T]` each."""

    def __init__(self, parquet_files, tokenizer, config, processor=None, max_samples=-1):  # noqa: ARG002 (verl's call)
        if config.get("pad_mode") != "no_padding":
            raise ValueError(
                f"data.pad_mode={config.get('pad_mode')}: rows are not padded; give data.pad_mode=no_padding."
            )
        names = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        files = [
            file for name in map(Path, names) for file in (sorted(name.glob("*.parquet")) if name.is_dir() else [name])
        ]
        # Memory-mapped, one chunk for a file: a row is found without copying the others.
        self.rows = pa.concat_tables([pq.read_table(file, memory_map=True) for file in files])
        if max_samples > 0:
            self.rows = self.rows.slice(0, max_samples)
        longest = pc.max(pc.list_value_length(self.rows["input_ids"])).as_py()
        limit = config.get("max_length") or 0  # verl itself would cut the row there, without a word
        if longest > limit:
            raise ValueError(
                f"a row has {longest} tokens, data.max_length={limit}: mask with --max-length {limit}, or raise it."
            )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {
            name: torch.tensor(self.rows[name][index].as_py(), dtype=torch.long)
            for name in ("input_ids", "position_ids", "loss_mask")
        }
