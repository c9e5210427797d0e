"""Whose tokens a row is made of, for the report.

<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nyo<|im_end|>
template         user template                        trained
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np

from sft_plugins.masking.encoding.pieces import Pieces


class Origin(NamedTuple):
    """What a row was made of.

    Attributes:
        ids: of all its tokens.
        trained: half-open spans of them.
        contents: roles and contents of the row's messages, as `Conversation.contents` has them.
        rendered: the text whose bytes the ids are known to stand for, and maybe more behind it; None where that is not known.
    """

    ids: list[int]
    trained: Sequence[tuple[int, int]]
    contents: Sequence[tuple[str, bytes]]
    rendered: str | None


def count_origins(rows: Sequence[Origin], pieces: Pieces | None) -> list[dict[str, int]]:
    """Tokens of each row by origin: `trained`, untrained ones by role, and `template` for all that the template adds.

    A token counts for a role if any of its bytes lie in a message of it. Where ids stand for no fixed bytes, untrained
    tokens count as `untrained` together.
    """
    counts = [{"trained": sum(end - start for start, end in row.trained)} for row in rows]
    if pieces is None:
        for row, found in zip(rows, counts, strict=True):
            found["untrained"] = len(row.ids) - found["trained"]
        return counts
    bounds = [*accumulate((len(row.ids) for row in rows), initial=0)]
    ends = np.cumsum(pieces.widths[np.fromiter(chain.from_iterable(row.ids for row in rows), np.int64, bounds[-1])])
    offsets = np.concatenate(([0], ends))[bounds].tolist()  # of each row's bytes
    spans: list[int] = []  # first and last byte of every content that is found
    roles = [_found(row, *pair, pieces, spans) for row, pair in zip(rows, pairwise(offsets), strict=True)]
    tokens = iter(np.searchsorted(ends, spans, side="right").tolist())
    for row, found, own, first in zip(rows, counts, roles, bounds, strict=False):
        for role, begin, final in zip(own, tokens, tokens, strict=False):
            if role != "assistant" or not any(start <= begin - first < end for start, end in row.trained):
                found[role] = found.get(role, 0) + final + 1 - begin
        found["template"] = len(row.ids) - sum(found.values())
    return counts


def _found(row: Origin, offset: int, end: int, pieces: Pieces, spans: list[int]) -> list[str]:
    """Roles of the contents that stand in the row's bytes, `[offset, end)` of all, one after another; where goes to `spans`."""
    spelled = pieces.joined(row.ids) if row.rendered is None else row.rendered.encode()[: end - offset]
    roles: list[str] = []
    position = 0
    for role, content in row.contents:
        found = spelled.find(content, position) if content else -1
        if found >= 0:
            position = found + len(content)
            roles.append(role)
            spans += (offset + found, offset + position - 1)
    return roles
