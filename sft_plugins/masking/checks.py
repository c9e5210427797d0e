"""The four invariants of a masked row, each checked by code that did not make the row.

    input_ids   1   5   6   2   7   8   2          1 = BOS, 2 = stop
    labels    −100 −100 −100 −100 7   8   2        one supervised run, [4, 7), that ends on a stop token

Structure and stop (`_rows.first_fault`): labels are −100 or the id, the first is −100, every id exists, at least one token
carries loss, BOS stands once, every supervised run ends on an id that stops generation. Coverage (`required_texts`,
`first_missing`): the turn's text holds the data's own text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np

from sft_plugins._rows import RowRules as RowRules
from sft_plugins._rows import first_fault, length_mismatch
from sft_plugins._rows import supervised_runs as supervised_runs
from sft_plugins.errors import MaskingError
from sft_plugins.masking.examples.content import content_text
from sft_plugins.masking.examples.messages import Message, reasoning_texts
from sft_plugins.masking.examples.tools import tool_call_texts

_THINK_TAG = re.compile(r"</?think>|</?seed:think>|\[/?THINK\]")


def find_violation(ids: np.ndarray, labels: np.ndarray, rules: RowRules) -> MaskingError | None:
    """The first invariant that one row (`[T]` each) breaks, or None."""
    if len(ids) != len(labels):
        return length_mismatch("labels", len(labels), len(ids), MaskingError)
    found = first_fault(ids, labels, np.array([len(ids)]), rules, MaskingError)
    return found and found.at_row(None)


def required_texts(message: Message) -> list[list[str]]:
    """What the rendering of an assistant message must hold, as groups whose texts must appear in order.

    Content and reasoning count verbatim but for white space at their ends, and at the ends of the parts that a thinking
    tag divides them into; tool calls by name and by the leaves of their arguments.
    """
    groups = [
        [part.strip() for part in _THINK_TAG.split(text) if part.strip()]
        for text in (content_text(message.get("content")), *reasoning_texts(message))
    ]
    for call in message.get("tool_calls") or ():
        groups.append([text.strip() for text in tool_call_texts(call) if text.strip()])
    return [group for group in groups if group]


def first_missing(rendered: str, message: Message) -> str | None:
    """The first text of the message that `rendered` does not hold, or None if it holds all."""
    content = message.get("content")
    usual = len(message) == 2 and isinstance(content, str) and "<" not in content and "[" not in content
    if usual and content.strip() in rendered:  # type: ignore[union-attr]
        return None
    for group in required_texts(message):
        position = 0
        for text in group:
            found = _find(rendered, text, position)
            if (
                found < 0 and (found := _find(rendered, text, 0)) < 0
            ):  # templates may sort arguments, put reasoning first
                return text
            position = found + len(text)
    return None


def _find(rendered: str, text: str, position: int) -> int:
    found = rendered.find(text, position)
    if found >= 0:
        return found
    for ascii_only in (False, True):  # arguments rendered as JSON
        found = rendered.find(json.dumps(text, ensure_ascii=ascii_only)[1:-1], position)
        if found >= 0:
            return found
    return -1


def batch_is_clean(rows: Sequence[tuple[np.ndarray, np.ndarray]], rules: RowRules) -> bool:
    """Whether `find_violation` is None for every row, `(input_ids, labels)`, at the price of one pass over them all."""
    lengths = [len(ids) for ids, _ in rows]
    if lengths != [len(labels) for _, labels in rows]:
        return False
    if not rows:
        return True
    ids, labels = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return first_fault(ids, labels, np.array(lengths), rules, MaskingError) is None


def check_batch(arrays: Sequence[tuple[np.ndarray, np.ndarray]], rules: RowRules) -> None:
    """Raises:
    MaskingError: for the first bad row, with its position in the batch as `row`.
    """
    for row, (ids, labels) in enumerate(arrays):
        if len(ids) != len(labels):
            raise length_mismatch("labels", len(labels), len(ids), MaskingError).at_row(row)
    ids, labels = (np.concatenate(parts) for parts in zip(*arrays, strict=True))
    if violation := first_fault(ids, labels, np.array([len(ids) for ids, _ in arrays]), rules, MaskingError):
        raise violation
