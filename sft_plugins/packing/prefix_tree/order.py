"""Rows in the order in which those that begin alike stand together: a sort that reads each shared token once or twice.

Written for numba (`compiled`), runnable as plain Python. Rows of one group share all tokens before `depth`; the group is sorted
by its tokens there, and every run of equal ones is a group that shares more.

    A B E   A B C D   A B      →      A B C D   A B E   A B        the end of a row stands behind every token
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[Any]


def sort_rows(values: Sequence[Ints], chunk: Ints, start: Ints, length: Ints, order: Ints) -> None:
    """Sort `order`, numbers of rows, in place by their tokens; equal rows keep their order.

    Args:
        values, chunk, start: row r begins at `values[chunk[r]][start[r]]`; length: `[n]`, tokens of each.
    """
    n = len(order)
    behind = np.int64(2**62)
    keys = np.empty(n, np.int64)
    low, high, deep = np.empty(n + 1, np.int64), np.empty(n + 1, np.int64), np.empty(n + 1, np.int64)
    low[0], high[0], deep[0] = 0, n, 0
    waiting = 1
    while waiting > 0:
        waiting -= 1
        lo, hi, depth = low[waiting], high[waiting], deep[waiting]
        if hi - lo < 2:
            continue
        first = order[lo]
        pattern, at = values[chunk[first]], start[first] + depth
        common = length[first] - depth
        for k in range(lo + 1, hi):
            row = order[k]
            tokens, begin = values[chunk[row]], start[row] + depth
            common = min(common, length[row] - depth)
            for j in range(common):
                if tokens[begin + j] != pattern[at + j]:
                    common = j
                    break
            if common == 0:
                break
        depth += common
        for k in range(lo, hi):
            row = order[k]
            keys[k] = values[chunk[row]][start[row] + depth] if depth < length[row] else behind
        by = np.argsort(keys[lo:hi], kind="mergesort")
        order[lo:hi] = order[lo:hi][by]
        keys[lo:hi] = keys[lo:hi][by]
        begin = lo
        for k in range(lo + 1, hi + 1):
            if k == hi or keys[k] != keys[begin]:
                if k - begin > 1 and keys[begin] != behind:  # rows that end here are equal
                    low[waiting], high[waiting], deep[waiting] = begin, k, depth + 1
                    waiting += 1
                begin = k
