"""`docs/many-processes.md`: its Python runs, on rows as the page says they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sft_plugins import pack_dataset

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "many-processes.md").read_text(encoding="utf-8")


def test_every_python_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_list([{"input_ids": [i, 5, 6, 7], "labels": [-100, 5, 6, 7]} for i in range(13)])
    names: dict[str, Any] = {"rows": rows, "packed": pack_dataset(rows, 8).dataset}
    assert len(names["packed"]) == 7
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert len(names["packed"]) == 8
    assert sum(len(row["seq_lengths"]) for row in names["train_dataset"]) == 13
    assert names["arguments"].accelerator_config.dispatch_batches is False
