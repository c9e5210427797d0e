"""What a check found, as data: one `Finding` per fault, and the colour that all of them come to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]
Part = Literal["config", "data", "masking", "packing"]
Colour = Literal["green", "amber", "red"]

PARTS: tuple[Part, ...] = ("config", "data", "masking", "packing")
_COLOURS: dict[Level, Colour] = {"error": "red", "warning": "amber", "note": "green"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault, or one thing worth knowing.

    Attributes:
        level: `error` spoils the training, `warning` may, `note` does not.
        part: which of the checks found it.
        code: stable name of the fault.
        where: a file, a setting, an entry of `datasets`.
        message: what was found. remedy: what to do.
        count: rows it concerns (1 for a setting). rows: the first of them, counted from 0.
        failure: the failure of the field that it is an instance of, `"M7"`, `"P1"`.
    """

    level: Level
    part: Part
    code: str
    where: str
    message: str
    remedy: str = ""
    count: int = 1
    rows: tuple[int, ...] = ()
    failure: str = ""


def colour(findings: Iterable[Finding]) -> Colour:
    """`red` with any error, else `amber` with any warning, else `green`."""
    found = {_COLOURS[finding.level] for finding in findings}
    return "red" if "red" in found else "amber" if "amber" in found else "green"
