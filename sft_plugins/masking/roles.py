"""Which part of a row came from whom: a count for the report, read off the row's own bytes.

<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nyo<|im_end|>
template         user template                        trained
"""

from __future__ import annotations

import numpy as np

from sft_plugins.masking.assemble import Row
from sft_plugins.masking.examples import content_text
from sft_plugins.masking.text import TextTokenizer


def role_tokens(row: Row, text: TextTokenizer) -> dict[str, int]:
    """Tokens of the row by origin: `trained`, untrained ones by role, and `template` for all that the template adds.

    A token counts for a role if any of its bytes lie in a message of it. Where ids stand for no fixed bytes, untrained
    tokens count as `untrained` together.
    """
    trained = sum(end - start for start, end in row.spans)
    widths = text.widths(row.input_ids)
    if widths is None:
        return {"trained": trained, "untrained": len(row.input_ids) - trained}
    ends = np.cumsum(widths)
    rendered = text.decode_bytes(row.input_ids)
    counts = {"trained": trained}
    position = 0
    last = row.turns[-1]
    for message in last.conversation.messages[: last.index + 1]:
        content = content_text(message.get("content")).strip().encode()
        found = rendered.find(content, position) if content else -1
        if found < 0:
            continue
        position = found + len(content)
        first = np.searchsorted(ends, found, side="right")
        stop = np.searchsorted(ends, position - 1, side="right") + 1
        if not any(start <= first < end for start, end in row.spans):
            counts[message["role"]] = counts.get(message["role"], 0) + int(stop - first)
    counts["template"] = len(row.input_ids) - sum(counts.values())
    return counts
