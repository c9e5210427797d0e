"""A histogram of document lengths as lines of text, as wide as its terminal.

1–128     ▏  12  ██▌
129–256   ▏ 310  ████████████████████████████
"""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

BINS = 12
_STEPS = " ▏▎▍▌▋▊▉"  # eighths of a cell
_NICE = (1, 2, 5)


def bins(lengths: Any, *, limit: int | None = None, most: int = BINS) -> list[tuple[int, int, int]]:
    """`(shortest, longest, documents)` of at most `most` bins that cover all lengths.

    Their width is 1, 2 or 5 times a power of ten. They reach as far as `limit` or 95 % of the documents, whichever is more; the
    few that are longer still share the last one, so that one of 30,000 tokens does not make a single bar of all others.

    Example:
        >>> bins([1, 3, 3, 10], limit=10, most=2)
        [(1, 5, 3), (6, 10, 1)]
        >>> bins([5] * 99 + [3000], limit=8, most=3)
        [(1, 5, 99), (6, 10, 0), (11, 3000, 1)]
    """
    lengths = np.asarray(lengths)
    if not len(lengths):
        return []
    longest = int(lengths.max())
    reach = max(limit or 1, int(np.percentile(lengths, 95)))
    if reach < longest:
        most -= 1
    reach = min(reach, longest)
    width = next(nice * 10**power for power in range(12) for nice in _NICE if nice * 10**power * most >= reach)
    number = -(-reach // width)
    counts = np.bincount(np.minimum((lengths - 1) // width, number), minlength=number)
    found = [(i * width + 1, (i + 1) * width, int(count)) for i, count in enumerate(counts)]
    if len(found) > number:
        found[-1] = (found[-1][0], longest, found[-1][2])
    return found


def histogram(lengths: Any, console: Console, *, limit: int | None = None) -> Text:
    """Bars for `bins(lengths)`; those that begin beyond `limit` are in red, and say so without colour."""
    rows = bins(lengths, limit=limit)
    if not rows:
        return Text()
    labels = [f"{low:,}–{high:,}" for low, high, _ in rows]
    numbers = [f"{count:,}" for *_, count in rows]
    left, middle = max(map(len, labels)), max(map(len, numbers))
    over = [limit is not None and low > limit for low, *_ in rows]
    left_over = console.width - left - middle - 4
    note = (" over the limit" if left_over > 20 else " !") if any(over) else ""
    room = max(1, min(60, left_over - len(note)))
    most = max(count for *_, count in rows)
    text = Text()
    ascii_only = console.options.ascii_only
    for (_, _, count), label, number, beyond in zip(rows, labels, numbers, over, strict=True):
        drawn = bar(count / most * room, ascii_only=ascii_only)
        line = Text(f"{label.replace('–', '-') if ascii_only else label:>{left}}  {number:>{middle}}  ")
        line.append(drawn, style="red" if beyond else "cyan")
        if beyond and count:
            line.append(note, style="red")
        text.append_text(line).append("\n")
    text.right_crop()
    return text


def bar(cells: float, *, ascii_only: bool = False) -> str:
    """A bar `cells` long, to an eighth of a cell; anything above nothing shows."""
    if ascii_only:
        return "#" * max(round(cells), cells > 0)
    eighths = max(round(cells * 8), int(cells > 0))
    return "█" * (eighths // 8) + _STEPS[eighths % 8].strip()
