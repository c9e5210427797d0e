"""Which rows some other row begins like: a look at few tokens of each, before any row is folded.

Invariant: no row that could share is left out; one that shares nothing is rarely kept. Rows of more than `least` tokens share
where their first `least + 1` are equal; a shorter one, only where all of it begins another row.

Loops are written for numba (`compiled`), runnable as plain Python.
"""

from __future__ import annotations

import numpy as np

from sft_plugins.packing.arrow import Ints, TokenColumn
from sft_plugins.packing.compiled import compiled


def may_share(ids: TokenColumn, lengths: Ints, least: int) -> Ints:
    """The rows, ascending, that may share tokens with another. `lengths`: how many tokens of each count."""
    weights = np.random.default_rng(0).integers(0, 2**63, least + 1, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    long = np.flatnonzero(lengths > least)
    found = np.empty(len(long), np.uint64)

    def look(values: Ints, part: Ints) -> None:
        found[part] = compiled(hash_beginnings)(values, ids.start[long[part]], weights)

    ids.in_threads(look, long)
    in_order = np.sort(found)
    twice = in_order[1:][in_order[1:] == in_order[:-1]]
    alike = long[np.isin(found, twice)] if len(twice) else long[:0]
    if len(long) == len(lengths):
        return alike
    return np.union1d(alike, _around_short(ids, lengths, least, weights))


def _around_short(ids: TokenColumn, lengths: Ints, least: int, weights: Ints) -> Ints:
    """Rows of at most `least` tokens that begin another row, and the rows that they begin."""
    short, every = np.flatnonzero(lengths <= least), np.arange(len(lengths))
    bits = max(20, (16 * len(short)).bit_length())
    shift = np.uint64(64 - bits)
    ends, passed, numbers = np.zeros(2**bits, np.int64), np.zeros(2**bits, np.int64), np.zeros(2**bits, np.uint64)
    slots, kept = np.empty(len(short), np.int64), np.zeros(len(lengths), np.bool_)
    for values, part in ids.by_chunk(short):
        rows = short[part]
        slots[part] = compiled(note_ends)(values, ids.start[rows], lengths[rows], weights, shift, ends, passed, numbers)
    for values, part in ids.by_chunk(every):
        kept[part] = compiled(note_passing)(
            values, ids.start[part], lengths[part], weights, shift, ends, passed, numbers
        )
    kept[short] |= (passed[slots] >> lengths[short]) & 1 == 1
    return np.flatnonzero(kept)


def hash_beginnings(values: Ints, starts: Ints, weights: Ints) -> Ints:
    """`[n]`: of each row a number of its first `len(weights)` tokens. Equal beginnings have equal numbers."""
    out = np.empty(len(starts), np.uint64)
    for row in range(len(starts)):
        tokens = values[starts[row] : starts[row] + len(weights)]
        mixed = np.uint64(0)
        for q in range(len(weights)):  # a sum, so that several are multiplied at once
            mixed += np.uint64(tokens[q]) * weights[q]
        out[row] = mixed
    return out


def note_ends(
    values: Ints, starts: Ints, lengths: Ints, weights: Ints, shift: np.uint64, ends: Ints, passed: Ints, numbers: Ints
) -> Ints:
    """Where each row ends: its slot in the tables, which the high bits of its number choose.

    Sets the bit of its length in `ends`, and in `passed` where an earlier row has; in `numbers` its number, 0 where several
    numbers share the slot.
    """
    out = np.empty(len(starts), np.int64)
    for row in range(len(starts)):
        mixed = np.uint64(0)
        for q in range(lengths[row]):
            mixed += np.uint64(values[starts[row] + q]) * weights[q]
        slot, bit = np.int64(mixed >> shift), np.int64(1) << lengths[row]
        numbers[slot] = mixed if ends[slot] == 0 or numbers[slot] == mixed else np.uint64(0)
        passed[slot] |= ends[slot] & bit
        ends[slot] |= bit
        out[row] = slot
    return out


def note_passing(
    values: Ints, starts: Ints, lengths: Ints, weights: Ints, shift: np.uint64, ends: Ints, passed: Ints, numbers: Ints
) -> Ints:
    """`[n]`: whether another row ends inside each row; sets in `passed` the bit of its length there."""
    out = np.zeros(len(starts), np.bool_)
    for row in range(len(starts)):
        mixed = np.uint64(0)
        for q in range(min(lengths[row], len(weights)) - 1):
            mixed += np.uint64(values[starts[row] + q]) * weights[q]
            slot, bit = np.int64(mixed >> shift), np.int64(1) << np.int64(q + 1)
            if ends[slot] & bit and (numbers[slot] == mixed or numbers[slot] == 0):
                passed[slot] |= bit
                out[row] = True
    return out
