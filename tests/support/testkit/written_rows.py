"""`sft-plugins mask` run, and what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import load_from_disk

from testkit.commands import invoke

COUNT = 40


def written(folder: Path) -> dict[str, list[Any]]:
    """The columns of the rows in `folder`, read by the libraries that trainers read them with."""
    if list((folder / "rows").glob("*.parquet")):
        return pq.read_table(folder / "rows").to_pydict()
    return load_from_disk(str(folder / "rows")).to_dict()


def run(data: Path, model: Path, output: Path, *more: object) -> dict[str, Any]:
    done = invoke("mask", data, "--model", model, "--output", output, "--json", *more)
    assert done.exit_code == 0, done.output
    said: dict[str, Any] = json.loads(done.stdout)
    return said
