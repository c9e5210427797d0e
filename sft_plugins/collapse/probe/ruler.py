"""The range in which a ruler of meaning measures: no figure comes from texts that it cannot read (C11).

Read a text it may be given, measured on texts of known truth made from the very answers of a side:

    words of the answers   ferry sunrise pier waved carpenter measures twice cut …
    different              "ferry twice waved" | "carpenter pier cut"       nothing in common: must be far apart
    repeated               "ferry twice waved" | "waved ferry twice"        the same words: must be near

Whatever the answers say, also where all say the same, that is a scale. An English encoder puts different words of English 0.8
apart, of Hindi 0.2, of Khmer 0.001, so it cannot tell a model that speaks Hindi now from one that has collapsed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["Reading", "out_of_range", "read_texts"]

MAX_UNKNOWN = 0.1
"""Largest share of unknown tokens. Each stands for a word that was not read."""
CONTRAST = 3.0
"""Different words must be this many times as far apart as the same words in another order."""
SCALE = 0.5
"""Different words must be this share as far apart as English ones, which the ruler is known by."""
SAME_SCALE = 0.8
"""In another language than the baseline's, this share of the baseline's scale at least, and its inverse at most."""
REPEATED_TEXTS = 0.25
"""Share of different texts up to which nothing needs reading: the same text means the same to every ruler."""
SAME_LANGUAGE = 0.25
"""Share of an answer's words that the baseline used, too, from which both are taken to be of one language."""
_SALADS, _WORDS, _LEAST_WORDS = 12, 12, 8
_LONG_WORD = 12  # characters of a "word" on average, in scripts that put no blanks between words
_SIGNS = 3

Encode = Callable[[Sequence[str]], "np.ndarray | None"]


@dataclass(frozen=True)
class Reading:
    """How a ruler reads one side's answers. `unknown` is None where the ruler does not tell, `different` and `repeated`
    (1 − cosine) where there are too few words to make two texts of.
    """

    unknown: float | None
    different: float | None
    repeated: float | None
    words: frozenset[str]
    distinct: float
    """Different texts ÷ texts."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; of the words their number."""
        return {**asdict(self), "words": len(self.words)}


def read_texts(
    texts: Sequence[str],
    encode: Encode,
    *,
    unknown: Callable[[Sequence[str]], float] | None,
    centre: np.ndarray | None = None,
    seed: int = 0,
) -> Reading:
    """The scale of the ruler on `texts`.

    Args:
        encode: N strings → `[N, D]`; called once.
        unknown: share of unknown tokens in given texts.
        centre: taken off every vector before any cosine, as for the figures themselves.
    """
    share = None if unknown is None else unknown(texts)
    distinct = len(set(texts)) / len(texts) if texts else 0.0
    units = list(dict.fromkeys(unit for text in texts for unit in _units(text)))
    words = frozenset(unit.casefold() for unit in units)
    if len(words) < _LEAST_WORDS:
        return Reading(share, None, None, words, distinct)
    rng = random.Random(seed)
    size = min(_WORDS, len(units) // 2)
    salads = []
    for _ in range(_SALADS):
        drawn = rng.sample(units, 2 * size)
        again = drawn[:size]
        rng.shuffle(again)
        salads += [" ".join(drawn[:size]), " ".join(drawn[size:]), " ".join(again)]
    vectors = encode(salads)
    if vectors is None:
        return Reading(share, None, None, words, distinct)
    rows = np.asarray(vectors, dtype=np.float64) - (0 if centre is None else centre)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not (norms > 0).all():
        return Reading(share, 0.0, 0.0, words, distinct)  # a text without direction was not read
    rows = rows / norms
    first, other, again_ = rows[::3], rows[1::3], rows[2::3]
    different, repeated = (float(np.mean(1 - (first * side).sum(axis=1))) for side in (other, again_))
    return Reading(share, different, max(0.0, repeated), words, distinct)


def out_of_range(now: Reading, base: Reading | None, *, english: float | None, ruler: str) -> str | None:
    """Why the ruler cannot read the answers of `now`, in words; None where it can.

    Args:
        base: the baseline's reading; None when `now` is the baseline itself.
        english: `different` of English texts by the same ruler; None where its vectors are centred on the baseline, since
            a text of another language is then far from everything.
        ruler: what to call it.
    """
    if base is not None and now.distinct <= REPEATED_TEXTS:
        return None
    side = "the baseline's answers" if base is None else "the answers now"
    if now.unknown is not None and now.unknown > MAX_UNKNOWN:
        return f"{now.unknown:.0%} of the tokens in {side} are unknown to {ruler} (limit {MAX_UNKNOWN:.0%})"
    if now.different is None or now.repeated is None:
        return None  # a handful of words: what differs between such answers is their words
    if base is not None and _known(now, base) >= SAME_LANGUAGE:
        return None  # of the baseline's language, which was found readable
    scale = f"{ruler} puts texts made of different words in {side} {now.different:.2f} apart (1 − cosine)"
    if now.different < CONTRAST * now.repeated:
        return f"{scale}, the same words in another order {now.repeated:.2f}: it hardly reads them"
    if english is not None and now.different < SCALE * english:
        return f"{scale}, of English {english:.2f}: it hardly reads this language"
    if base is not None and base.different is not None:
        share = now.different / base.different if base.different > 0 else np.inf
        if not SAME_SCALE <= share <= 1 / SAME_SCALE:
            return f"{scale}, in the baseline's {base.different:.2f}: the two are of languages it reads unequally well"
    return None


def _known(now: Reading, base: Reading) -> float:
    return len(now.words & base.words) / len(now.words)


def _units(text: str) -> list[str]:
    """What stands for words: the parts between blanks; of scripts without blanks, runs of three signs."""
    parts = text.split()
    if parts and sum(map(len, parts)) / len(parts) <= _LONG_WORD:
        return [part.strip(".,;:!?\"'()[]।។…“”„«»") or part for part in parts]
    signs = "".join(parts)
    return [signs[i : i + _SIGNS] for i in range(0, len(signs), _SIGNS)]
