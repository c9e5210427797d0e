"""Which part of a row came from whom: a count for the report, read off the row's own bytes.

<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nyo<|im_end|>
template         user template                        trained
"""

from __future__ import annotations

import numpy as np

from sft_plugins.masking.examples.messages import content_text
from sft_plugins.masking.turns.labels import Row
from sft_plugins.masking.turns.tokenizer import TextTokenizer


def role_tokens(row: Row, text: TextTokenizer) -> dict[str, int]:
    """Tokens of the row by origin: `trained`, untrained ones by role, and `template` for all that the template adds.

    A token counts for a role if any of its bytes lie in a message of it. Where ids stand for no fixed bytes, untrained
    tokens count as `untrained` together.
    """
    trained = sum(end - start for start, end in row.spans)
    widths = text.widths(row.input_ids)
    if widths is None:
        return {"trained": trained, "untrained": len(row.input_ids) - trained}
    rendered = text.decode_bytes(row.input_ids)
    roles: list[str] = []
    spans: list[tuple[int, int]] = []  # of bytes, each holding at least one
    position = 0
    last = row.turns[-1]
    for message in last.conversation.messages[: last.index + 1]:
        content = content_text(message.get("content")).strip().encode()
        found = rendered.find(content, position) if content else -1
        if found >= 0:
            position = found + len(content)
            roles.append(message["role"])
            spans.append((found, position - 1))
    counts = {"trained": trained}
    tokens = np.searchsorted(np.cumsum(widths), np.array(spans, np.int64).reshape(-1, 2), side="right").tolist()
    for role, (first, final) in zip(roles, tokens, strict=True):
        if role != "assistant" or not _within(first, row.spans):
            counts[role] = counts.get(role, 0) + final + 1 - first
    counts["template"] = len(row.input_ids) - sum(counts.values())
    return counts


def _within(position: int, spans: list[tuple[int, int]]) -> bool:
    return any(start <= position < end for start, end in spans)
