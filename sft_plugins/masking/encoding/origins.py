"""Whose tokens a row is made of, for the report.

<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nyo<|im_end|>
template         user template                        trained
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sft_plugins.masking.encoding.pieces import Pieces


def count_origins(
    ids: list[int],
    trained: Sequence[tuple[int, int]],
    contents: Sequence[tuple[str, bytes]],
    pieces: Pieces | None,
    rendered: str | None,
) -> dict[str, int]:
    """Tokens by origin: `trained`, untrained ones by role, and `template` for all that the template adds.

    A token counts for a role if any of its bytes lie in a message of it. Where ids stand for no fixed bytes, untrained
    tokens count as `untrained` together.

    Args:
        trained: half-open spans of `ids`.
        contents: roles and contents of the row's messages, as `Conversation.contents` has them.
        rendered: the text whose bytes the ids are known to stand for, and maybe more behind it; None where that is not known.
    """
    supervised = sum(end - start for start, end in trained)
    if pieces is None:
        return {"trained": supervised, "untrained": len(ids) - supervised}
    ends = np.cumsum(pieces.widths[np.asarray(ids, np.int64)])
    spelled = pieces.joined(ids) if rendered is None else rendered.encode()[: ends[-1]]
    roles: list[str] = []
    spans: list[tuple[int, int]] = []  # of bytes, each holding at least one
    position = 0
    for role, content in contents:
        found = spelled.find(content, position) if content else -1
        if found >= 0:
            position = found + len(content)
            roles.append(role)
            spans.append((found, position - 1))
    counts = {"trained": supervised}
    tokens = np.searchsorted(ends, np.array(spans, np.int64).reshape(-1, 2), side="right").tolist()
    for role, (first, final) in zip(roles, tokens, strict=True):
        if role != "assistant" or not any(start <= first < end for start, end in trained):
            counts[role] = counts.get(role, 0) + final + 1 - first
    counts["template"] = len(ids) - sum(counts.values())
    return counts
