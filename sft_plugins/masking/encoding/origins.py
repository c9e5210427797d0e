"""Whose tokens a row is made of, for the report.

<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nyo<|im_end|>
template         user template                        trained
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sft_plugins.masking.encoding.pieces import Pieces


class Origin(NamedTuple):
    """What a row was made of.

    Attributes:
        contents: roles and contents of the row's messages, as `Conversation.contents` has them.
        rendered: the text whose bytes the ids are known to stand for, and maybe more behind it; None where that is not known.
    """

    contents: Sequence[tuple[str, bytes]]
    rendered: str | None


class _Found(NamedTuple):
    """Where the contents of a row stand in its bytes, one after another: -1 for one that is empty or not there."""

    contents: Sequence[tuple[str, bytes]]
    spelled: bytes
    places: list[int]
    widths: list[int]
    roles: list[int]  # numbers


def count_origins(
    rows: Sequence[Origin], ids: np.ndarray, trained: np.ndarray, bounds: list[int], pieces: Pieces | None
) -> list[dict[str, int]]:
    """Tokens of each row by origin: `trained`, untrained ones by role, and `template` for all that the template adds.

    A token counts for a role if any of its bytes lie in a message of it. Where ids stand for no fixed bytes, untrained
    tokens count as `untrained` together.

    Args:
        ids, trained: of all rows, `[T]`, and whether they carry loss; bounds: where each row begins in them, and T.
    """
    lengths = np.diff(bounds)
    carried = np.diff(np.concatenate(([0], np.cumsum(trained)))[bounds])
    if pieces is None:
        return [
            {"trained": own, "untrained": rest}
            for own, rest in zip(carried.tolist(), (lengths - carried).tolist(), strict=True)
        ]
    ends = np.cumsum(pieces.widths[ids])
    offsets = np.concatenate(([0], ends))[bounds]  # of each row's bytes
    names: dict[str, int] = {"assistant": 0}
    found: _Found | None = None
    many: list[int] = []
    places: list[int] = []
    widths: list[int] = []
    roles: list[int] = []
    for row, (first, last), length in zip(rows, pairwise(bounds), np.diff(offsets).tolist(), strict=True):
        spelled = pieces.joined(ids[first:last]) if row.rendered is None else row.rendered.encode()[:length]
        found = _find(row.contents, spelled, names, found)
        many.append(len(found.places))
        places += found.places
        widths += found.widths
        roles += found.roles
    there = np.array(places, np.int64) >= 0
    of_row = np.repeat(np.arange(len(rows)), many)[there]
    role = np.array(roles, np.int64)[there]
    starts = offsets[of_row] + np.array(places, np.int64)[there]
    begins = np.searchsorted(ends, starts, side="right")
    finals = np.searchsorted(ends, starts + np.array(widths, np.int64)[there] - 1, side="right")
    counted = (role != names["assistant"]) | ~trained[begins]
    table = np.zeros((len(rows), len(names)), np.int64)
    np.add.at(table, (of_row[counted], role[counted]), (finals + 1 - begins)[counted])
    template = lengths - carried - table.sum(axis=1)
    return [
        {"trained": own, **{name: count for name, count in zip(names, counts, strict=True) if count}, "template": rest}
        for own, counts, rest in zip(carried.tolist(), table.tolist(), template.tolist(), strict=True)
    ]


def _find(
    contents: Sequence[tuple[str, bytes]], spelled: bytes, names: dict[str, int], before: _Found | None
) -> _Found:
    """`before`: those of the row before, which of a split conversation has most of the contents in the same places."""
    known, position = _taken_over(contents, spelled, before)
    places, widths, roles = (
        (before.places[:known], before.widths[:known], before.roles[:known]) if before else ([], [], [])
    )
    for role, content in contents[known:]:
        place = spelled.find(content, position) if content else -1
        position = place + len(content) if place >= 0 else position
        places.append(place)
        widths.append(len(content))
        roles.append(names.setdefault(role, len(names)))
    return _Found(contents, spelled, places, widths, roles)


def _taken_over(contents: Sequence[tuple[str, bytes]], spelled: bytes, before: _Found | None) -> tuple[int, int]:
    """How many of the leading contents stand in both rows, whose bytes are the same up to the end of the last of them, and
    that end."""
    if before is None or before.contents[:1] != contents[:1]:
        return 0, 0
    known = len(before.contents) - 1  # the last is an answer: it gets another header as history
    position = 0
    for place, width in zip(before.places[:known], before.widths, strict=False):
        if place >= 0:
            position = place + width
        elif width:  # not there: in these bytes it may be
            return 0, 0
    same = contents[:known] == before.contents[:known] and spelled.startswith(before.spelled[:position])
    return (known, position) if same else (0, 0)
