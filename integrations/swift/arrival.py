"""Whether what ms-swift's data loader gives are the rows that `sft-plugins mask` wrote.

`LazyLLMDataset` puts another row in the place of one that its template refuses, `--max_length` leaves longer rows out, and
a release may read rows otherwise: all of them without an error. So the first batches are held beside the rows on disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift.dataset import LazyLLMDataset

from sft_plugins.errors import MaskingError
from sft_plugins.integrations._arrival import difference

BATCHES = 4


def rows_of(dataset: Any) -> Any:
    """The rows on disk below ms-swift's data set.

    Raises:
        MaskingError: `host_dataset` for any other data set than that of `--cached_dataset` without `--packing`.
    """
    if isinstance(dataset, LazyLLMDataset) and {"input_ids", "labels"} <= set(dataset.dataset.column_names):
        return dataset.dataset
    raise MaskingError(
        f"the rows come from {type(dataset).__name__}, not from `--cached_dataset` alone.",
        code="host_dataset",
        remedy="Give `--cached_dataset` the folder rows/ that `sft-plugins mask --to swift` wrote, no `--dataset` beside it, "
        "and leave `--packing` and `--streaming` out: `sft-plugins mask --pack` packs.",
    )


def is_packed(rows: Any) -> bool:
    return "seq_lengths" in rows.column_names


def check_rows(trainer: Any) -> Any:
    """The training rows, once their manifests say that they are whole and of the trainer's tokenizer.

    Raises:
        MaskingError: `host_dataset`.
    """
    rows = rows_of(trainer.train_dataset)
    manifests = _manifests(rows)
    vocabulary = vocabulary_hash(trainer.template.tokenizer)
    for folder, manifest in manifests.items():
        if manifest["tokenizer"]["vocabulary_sha256"] != vocabulary:
            raise MaskingError(
                f"{folder} holds rows for another tokenizer, that of {manifest['tokenizer']['model']}.",
                code="host_dataset",
                remedy="Mask the data with the model that is trained.",
            )
    wanted = sum(manifest["rows"] for manifest in manifests.values())
    if len(rows) != wanted:
        longest = max(manifest["longest"] for manifest in manifests.values())
        raise MaskingError(
            f"{len(rows):,} of the {wanted:,} rows of {', '.join(map(str, manifests))} are trained.",
            code="host_dataset",
            remedy=f"Leave `--max_length` out, or give {longest} at least; a part of the data is masked with --limit.",
        )
    return rows


def _manifests(rows: Any) -> dict[Path, Mapping[str, Any]]:
    """By folder, what `sft-plugins mask` said of the rows that it wrote there."""
    folders = sorted({Path(file["filename"]).parent.parent for file in rows.cache_files})
    manifests = {}
    for folder in folders:
        file = folder / "manifest.json"
        if not file.is_file():
            raise MaskingError(
                f"{folder} has no manifest.json: its rows are not those of `sft-plugins mask`.",
                code="host_dataset",
                remedy="Give `--cached_dataset` the folder rows/ as it was written, with manifest.json beside it.",
            )
        manifests[folder] = json.loads(file.read_text(encoding="utf-8"))
    return manifests


def vocabulary_hash(tokenizer: Any) -> str:
    """Of tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def check_batches(dataloader: Any, rows: Any) -> int:
    """How many rows the first batches hold, once each was found to be that on disk.

    Rows are drawn as the data loader draws them, but not through its iterator, which would move the random numbers.

    Raises:
        MaskingError: `host_dataset` for ids or labels that differ, with the row.
    """
    sampler = getattr(dataloader, "batch_sampler", None)
    if sampler is None:
        raise MaskingError(
            "the data loader has no order that can be looked at.",
            code="host_dataset",
            remedy="Leave `--streaming` and sequence parallelism out.",
        )
    compared = 0
    for indices in itertools.islice(iter(sampler), BATCHES):
        given = dataloader.collate_fn([dataloader.dataset[i] for i in indices])
        found = difference(given, [rows[int(i)] for i in indices])
        if found is not None:
            raise MaskingError(
                f"the rows {', '.join(map(str, indices))} differ between the data loader and the disk: {found}.",
                code="host_dataset",
                row=int(indices[0]),
                remedy="This release of ms-swift reads rows otherwise: use the one in docs/ms-swift.md.",
            )
        compared += len(indices)
    return compared
