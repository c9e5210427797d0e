"""Where packed rows live: memory, or an Arrow file that is written batch by batch and mapped.

Invariant: a file appears whole or not at all, and lies where the user's datasets already keep theirs.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, is_caching_enabled
from datasets.fingerprint import Hasher, get_temporary_cache_files_directory

IN_MEMORY_BYTES = 2**28
"""Results of a dataset on disk up to this size are kept in memory; larger ones go to a file."""


def place(dataset: Dataset, features: Features, tokens: int, cache_file: str | os.PathLike[str] | None) -> Path | None:
    """Where the packed rows are written; None for memory."""
    if cache_file is not None:
        return Path(cache_file)
    width = sum(np.dtype(features[name].feature.dtype).itemsize for name in ("input_ids", "labels"))
    if not dataset.cache_files or tokens * width <= IN_MEMORY_BYTES:
        return None
    beside = Path(dataset.cache_files[0]["filename"]).parent
    if not is_caching_enabled() or not os.access(beside, os.W_OK):
        return Path(get_temporary_cache_files_directory()) / f"cache-{uuid.uuid4().hex}.arrow"
    return beside


def store(
    dataset: Dataset, batches: Iterator[pa.RecordBatch], features: Features, path: Path | None, options: Any
) -> Dataset:
    """Write the batches to `path` (a folder: to a file named by the fingerprint) or keep them in memory."""
    fingerprint = Hasher.hash(("pack_dataset", dataset._fingerprint, options))
    info = dataset.info.copy()
    info.features = features
    if path is None:
        table = pa.Table.from_batches(list(batches), schema=features.arrow_schema)
        return Dataset(table, info=info, split=dataset.split, fingerprint=fingerprint)

    if path.is_dir():
        path = path / f"cache-{fingerprint}.arrow"
    # Other ranks may write the same file, and an earlier dataset may have it mapped: it appears whole or not at all.
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    metadata = {"huggingface": json.dumps({"info": {"features": features.to_dict()}, "fingerprint": fingerprint})}
    try:
        schema = features.arrow_schema.with_metadata(metadata)
        with (
            pa.OSFile(str(draft), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
            ThreadPoolExecutor(1) as behind,  # writes one batch while the next is gathered
        ):
            written: Future[None] | None = None
            for batch in batches:
                if written:
                    written.result()
                written = behind.submit(writer.write_batch, batch)
            if written:
                written.result()
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return Dataset.from_file(str(path), info=info, split=dataset.split)
