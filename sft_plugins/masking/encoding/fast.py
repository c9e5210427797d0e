"""A quicker encoder for the same ids: `fastokens`, where it is installed, and only while it equals the tokenizer's own.

first texts     the tokenizer itself; building the quick one takes as long as encoding about a megabyte
on trial        both, on characters of every script (once for a tokenizer) and on the next texts of the data, whose ids are the
                tokenizer's own: one that differs, and the quick one is never used
from there on   the quick one, and one text in 64 by both; one that differs raises `EncoderDiffersError`
"""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from collections.abc import Iterator
from itertools import accumulate, pairwise
from threading import Lock
from typing import Any

import numpy as np

_EVERY = 64
_COMPARED = 1 << 16  # characters of the data that both encode before the quick one is taken into use
_WORTH_TRYING = 4 * _COMPARED
_FEW = 8  # texts: those of a single row, a prompt, or a probe of ours go to the tokenizer itself
_CHARACTERS_PER_TOKEN = 20  # of the vocabulary: as much text takes as long as building does
_WORDS = (
    "It's John's, they'll SAY \"I'VE\" 3.14 1234567 items\r\n\r\n\tif x == y_z:  # no\n   return [x**2]\n\n\n",
    "  two  spaces   three\u00a0no-break\u200bzero\u2028line \ufeffmark e\u0301 ﬁ Å 한국어 ﷺ 👩🏽\u200d🚀 🇩🇪 \x00\x07",
    "naïve ΟΔΟΣ İstanbul 日本語とEnglishが混ざる。Привет, мир! مرحبا بالعالم नमस्ते दुनिया สวัสดี שלום 1٢३",
)


class EncoderDiffersError(Exception):
    """The quick encoder gave other ids than the tokenizer after it had been taken into use."""


class BatchEncoder:
    """Texts → ids, without special tokens added, as `encode_batch_fast` of a `tokenizers.Tokenizer` gives them.

    Attributes:
        against: why the quick encoder is not used although it is installed; None where it is used, or not yet tried.
    """

    def __init__(self, backend: Any, size: int, special: list[str]) -> None:
        self._backend, self.special = backend, special
        # Where one has been built in this process, the next masker has but to find and to try it.
        worth = _WORTH_TRYING if _build.cache_info().currsize else size * _CHARACTERS_PER_TOKEN
        self._waits_for = worth if installed() else None
        self._on_trial: QuickEncoder | None = None
        self._to_compare = _COMPARED
        self._quick: QuickEncoder | None = None
        self._encoded = 0
        self._counting = Lock()  # threads encode side by side (`ahead.py`)
        self._definition: str | None = None
        self.against: str | None = None

    def written_out(self, definition: str) -> None:
        """Told of the backend's `to_str()`, which takes as long as encoding 100,000 characters: it need not be made again."""
        if self._waits_for is not None:
            self._definition = definition

    def expect(self, texts: list[str]) -> None:
        """Told of texts that are to be encoded, by whichever thread: builds the quick encoder when they are worth it.

        By the thread that is here to stay, since memory that one took for building and gave back is not lent to others.
        """
        if self._waits_for is not None:
            self._waits_for -= sum(map(len, texts))
            if self._waits_for < 0:
                self._waits_for = None
                try:
                    self._on_trial = build(self._definition or self._backend.to_str())
                except BaseException as error:
                    self.turn_off(_told(error, "it does not take this tokenizer"))
                self._definition = None

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Raises:
        EncoderDiffersError: see above.
        """
        if len(texts) <= _FEW:
            return self.own(texts)
        if self._quick is not None:
            return self._by_both(texts, self._quick)
        ids = self.own(texts)
        with self._counting:
            if self._on_trial is not None:
                first = _first(texts)
                self._try(self._on_trial, first, ids[: len(first)])
        return ids

    def own(self, texts: list[str]) -> list[list[int]]:
        """By the tokenizer itself."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def turn_off(self, why: str) -> None:
        """Never use the quick encoder, or no longer."""
        self._quick = self._on_trial = self._waits_for = self._definition = None
        self.against = why

    def _try(self, quick: QuickEncoder, texts: list[str], own: list[list[int]]) -> None:
        """Hold it to the tokenizer's own ids of `texts`, and take it into use when it has been held to enough."""
        try:
            against = quick.differs_on_probes(self) or quick.differs_on(texts, own)
        except BaseException as error:
            against = _told(error, "it does not take this tokenizer")
        if against:
            self.turn_off(against)
            return
        self._to_compare -= sum(map(len, texts))
        if self._to_compare <= 0:
            self._quick, self._on_trial = quick, None

    def _by_both(self, texts: list[str], quick: QuickEncoder) -> list[list[int]]:
        try:
            ids = quick.encode(texts)
        except BaseException as error:
            raise EncoderDiffersError(_told(error, "it failed")) from error
        with self._counting:
            sample = range(-self._encoded % _EVERY, len(texts), _EVERY)
            self._encoded += len(texts)
        for i, own in zip(sample, self.own([texts[i] for i in sample]), strict=True):
            if ids[i] != own:
                raise EncoderDiffersError(f"it gave other ids for {texts[i][:40]!r}")
        return ids


def installed() -> bool:
    return importlib.util.find_spec("fastokens") is not None


class QuickEncoder:
    """An encoder of fastokens', and what is known of it."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._on_probes: str | None = None

    def encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        flat, offsets = self._encoder.encode_batch_flat(texts, add_special_tokens=False)
        tokens = np.frombuffer(flat, np.uint32).tolist()
        bounds = np.frombuffer(offsets, np.uint64).tolist()
        return [tokens[start:end] for start, end in pairwise(bounds)]

    def differs_on(self, texts: list[str], own: list[list[int]]) -> str:
        """The first of `texts` for which it gives other ids than the tokenizer's `own`, in words; empty if none."""
        for text, quick, ids in zip(texts, self.encode(texts), own, strict=True):
            if quick != ids:
                return f"it gives other ids for {text[:40]!r}"
        return ""

    def differs_on_probes(self, own: BatchEncoder) -> str:
        """… and of `probe_texts`, looked at once."""
        if self._on_probes is None:
            texts = [*probe_texts(own.special)]
            self._on_probes = self.differs_on(texts, own.own(texts))
        return self._on_probes


def _told(error: BaseException, what: str) -> str:
    """`what` a native library did, and its own words. A panic in it is no `Exception`; what ends a program is not its doing."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        raise error
    return f"{what} ({str(error)[:100]})"


def build(definition: str) -> QuickEncoder:
    """The quick encoder of a `tokenizer.json`."""
    return _build(definition)


@functools.lru_cache(maxsize=2)
def _build(definition: str) -> QuickEncoder:
    import fastokens

    return QuickEncoder(fastokens.Tokenizer.from_json_str(definition))


def _first(texts: list[str]) -> list[str]:
    """As many of `texts` as `_COMPARED` characters reach into."""
    ends = accumulate(map(len, texts), initial=0)
    return [text for text, before in zip(texts, ends, strict=False) if before < _COMPARED]


def probe_texts(special: list[str]) -> Iterator[str]:
    """Texts in which tokenizers differ: characters of every script, white space, digits, and special tokens amid text."""
    yield from _WORDS
    for token in special:
        yield f"a{token}b {token} \n{token}{token}é"
    # Every character of the alphabets, one in sixteen of the ideographs and syllables behind them.
    for start, end, step in ((0, 0x3000, 1), (0x3000, 0x30000, 16)):
        for block in range(start, end, 64 * step):
            characters = [chr(code) for code in range(block, block + 64 * step, step) if not 0xD800 <= code < 0xE000]
            known = [one for one in characters if unicodedata.category(one) != "Cn"]
            if known:
                yield "".join(known) + " " + " ".join(known[::3])
