"""The run's record: one JSON object a line, only ever appended to.

| kind | when | holds |
| --- | --- | --- |
| `run` | training begins or resumes | step, configuration, prompts, versions, baseline, embedder; `anew` |
| `baseline` | after it | samples and figures of the model before training |
| `log` | every log of the trainer | step, and its loss, entropy and so on (tier 0) |
| `probe` | every probe | step, tier, values with intervals, entropy by position, samples, finding, seconds |
| `problem` | something failed | step, stage, message |
| `end` | training ends | step, cost |

A run that resumes from step s appends a new `run` with `"step": s`: what stands before it with a later step belongs
to a future that did not happen, and `read_history` leaves it out; a `run` from step 0 starts
anew, and so does one with `anew`, because nothing before it can be compared. A
crash in mid-line costs that line: the next record begins on a line of its own, and the reader leaves out what was cut short
(C13). NaN and infinity are written as null, which JSON can hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO

from sft_plugins._report import plain
from sft_plugins.errors import CollapseError

__all__ = ["SCHEMA", "History", "config_hash", "plain", "read_history"]

SCHEMA = 1
_RUN = b'{"kind": "run"'
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
                line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass") + b"\n"
                with self.path.open("a+b") as file:
                    # What a crash has left half written must not become the beginning of this line.
                    file.write(line if _ends_a_line(file) else b"\n" + line)
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

    A line that a crash has cut short is left out: the last one, which may still be written to, and one that a resumed run
    follows, which is told in a `problem` record. Any other line that is not JSON raises.

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
    cut: list[int] = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        record = _record(line)
        if record is None and (glued := line.rfind(_RUN)) > 0:
            # Until 0.1.0 a resumed run went on in the line that a crash had cut short.
            record = _record(line[glued:])
            cut.append(number)
        if record is None:
            cut.append(number)
            continue
        if cut and record["kind"] != "run" and any(place < number for place in cut):
            raise CollapseError(
                f"line {cut[0] + 1} of {path} is not JSON: {lines[cut[0]][:60]!r}",
                code="history_file",
                row=cut[0],
                remedy="only a line that a crash has cut short may be so; the lines before and after it are whole: copy the "
                "file, and take this one line out of the copy",
            )
        if record.get("schema", SCHEMA) != SCHEMA:
            raise CollapseError(
                f"{path} has schema {record['schema']}, this version reads {SCHEMA}",
                code="history_file",
                row=number,
                remedy="read it with the version of sft-plugins that wrote it",
            )
        if record["kind"] == "run":
            kept = record["step"]  # 0: a run of its own, in a folder used before
            anew = not kept or record.get("anew")
            records = [r for r in records if not anew and r.get("step", 0) <= kept and r["kind"] != "end"]
            records.append(record)
            if cut and not anew:
                words = f"line {cut[0] + 1} of the history was cut short by a crash, and what it held is lost"
                records.append({"kind": "problem", "step": kept, "stage": "history", "message": words})
            cut = []
            continue
        records.append(record)
    if not any(r["kind"] == "run" for r in records):
        raise CollapseError(f"{path} holds no run", code="history_file", remedy=_REMEDY)
    return records


def _ends_a_line(file: BinaryIO) -> bool:
    """Whether what is appended begins a line of its own."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        return None
    return record if isinstance(record, dict) and "kind" in record else None


def config_hash(value: Any) -> str:
    """Sixteen hexadecimal digits that change with any part of `value`."""
    text = json.dumps(plain(value), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
