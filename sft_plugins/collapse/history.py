"""The run's record: one JSON object a line, only ever appended to.

| kind | when | holds |
| --- | --- | --- |
| `run` | training begins or resumes | step, configuration and its hash, prompts, versions, baseline, embedder |
| `baseline` | after it | samples and figures of the model before training |
| `log` | every log of the trainer | step, and its loss, entropy and so on (tier 0) |
| `probe` | every probe | step, tier, values with intervals, entropy by position, samples, finding, seconds |
| `problem` | something failed | step, stage, message |
| `end` | training ends | step, cost |

A run that resumes from step s appends a new `run` with `"step": s`: what stands before it with a later step belongs
to a future that did not happen, and `read_history` leaves it out; a `run` from step 0 starts anew. NaN and infinity
are written as null, which JSON can hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from sft_plugins.errors import CollapseError

__all__ = ["SCHEMA", "History", "config_hash", "plain", "read_history"]

SCHEMA = 1
_REMEDY = "pass the history.jsonl that ModeCollapseCallback wrote into its output_dir"
logger = logging.getLogger(__name__)


class History:
    """Appends records to a file. A folder that cannot be written is said once; the training it watches goes on."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []

    def append(self, kind: str, **values: Any) -> dict[str, Any]:
        """Write one record and return it as it was written. It is kept in memory even where the file cannot be
        written.
        """
        record = plain({"kind": kind, **values})
        self.records.append(record)
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            except OSError as error:
                logger.warning(
                    "collapse: cannot write %s (%s); training goes on, the history stays in memory and no report is "
                    "written. Pass output_dir= a folder that can be written.",
                    self.path,
                    error,
                )
                self.path = None
        return record


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The records of a run in order, without those that a resumed run took back.

    A last line cut short by a crash is left out; any other line that is not JSON raises.

    Raises:
        CollapseError: `history_file`.
    """
    path = Path(path)
    try:
        # Bytes: a crash may cut a character in two, and text splits at U+2028 too, which an answer may hold.
        lines = path.read_bytes().rstrip().split(b"\n")
    except OSError as error:
        raise CollapseError(
            f"cannot read the history {str(path)!r}: {error}", code="history_file", remedy=_REMEDY
        ) from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            if number == len(lines) - 1:
                break
            raise CollapseError(
                f"line {number + 1} of {path} is not JSON: {line[:60]!r}",
                code="history_file",
                row=number,
                remedy="only the last line may be cut short; restore the file, or remove this line and all after it",
            ) from error
        if record.get("schema", SCHEMA) != SCHEMA:
            raise CollapseError(
                f"{path} has schema {record['schema']}, this version reads {SCHEMA}",
                code="history_file",
                row=number,
                remedy="read it with the version of sft-plugins that wrote it",
            )
        if record["kind"] == "run":
            kept = record["step"]  # 0: a run of its own, in a folder used before
            records = [r for r in records if kept and r.get("step", 0) <= kept and r["kind"] != "end"]
        records.append(record)
    if not any(r["kind"] == "run" for r in records):
        raise CollapseError(f"{path} holds no run", code="history_file", remedy=_REMEDY)
    return records


def plain(value: Any) -> Any:
    """`value` in JSON's own types: arrays and tuples as lists, NumPy scalars as numbers, non-finite numbers as None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def config_hash(value: Any) -> str:
    """Sixteen hexadecimal digits that change with any part of `value`."""
    text = json.dumps(plain(value), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
