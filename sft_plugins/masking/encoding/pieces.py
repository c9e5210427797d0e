"""The bytes that every id of a vocabulary stands for, kept as one blob, so that 150,000 of them cost no 150,000 objects.

    ids      0      1     2          blob    b"Hellolo w"     ends  5, 7, 9
    pieces   Hello  lo    " w"       joined([2, 1])  =  b" wlo"

Byte-level and SentencePiece vocabularies have such pieces. Which kind a vocabulary is, its tokens show; that its pieces are
what its ids decode to is for the caller to try on text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_FEW = 32  # ids below which joining slices is quicker than an array is made


class Pieces:
    """Bytes by id."""

    def __init__(self, blob: bytes, widths: Sequence[int]) -> None:
        self._blob, self._bytes = blob, np.frombuffer(blob, np.uint8)
        self.widths = np.array(widths, np.int64)
        self._ends = np.cumsum(self.widths)
        self._starts = self._ends - self.widths
        self._bounds = [0, *self._ends.tolist()]

    def __len__(self) -> int:
        return len(self.widths)

    def __getitem__(self, token: int) -> bytes:
        return self._blob[self._bounds[token] : self._bounds[token + 1]]

    def joined(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The pieces of `ids` one behind the other."""
        if len(ids) < _FEW:
            blob, bounds = self._blob, self._bounds
            return b"".join([blob[bounds[token] : bounds[token + 1]] for token in ids])
        widths = self.widths[np.asarray(ids, np.int64)]
        # Byte j of the result is byte j of its piece: where the piece begins, less what was written before it.
        shifts = self._starts[np.asarray(ids, np.int64)] - (np.cumsum(widths) - widths)
        return self._bytes[np.arange(int(widths.sum())) + np.repeat(shifts, widths)].tobytes()


def candidates(tokens: Sequence[str], added: Mapping[int, str]) -> Iterator[Pieces]:
    """The pieces of a vocabulary as each kind would have them, `added` tokens by their text; none of a kind it cannot be."""
    as_bytes = {byte: char for char, byte in _BYTE_OF.items()}
    spelled = list(tokens)
    for index, content in added.items():
        spelled[index] = "".join(as_bytes[byte] for byte in content.encode())
    codes = np.frombuffer("".join(spelled).encode("utf-32-le", "surrogatepass"), np.uint32)
    spelt = _BYTES[np.minimum(codes, len(_BYTES) - 1)]
    if (spelt >= 0).all():
        yield Pieces(spelt.astype(np.uint8).tobytes(), list(map(len, spelled)))
    pieces = [added[i].encode() if i in added else _sentencepiece(token) for i, token in enumerate(tokens)]
    yield Pieces(b"".join(pieces), list(map(len, pieces)))


def _sentencepiece(token: str) -> bytes:
    match = _HEX.fullmatch(token) if token.startswith("<0x") else None
    return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes: visible Latin-1 stands for itself, the rest for U+0100 onwards."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in visible}
    hidden = [byte for byte in range(256) if byte not in alphabet]
    return alphabet | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


_HEX = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_OF = {char: byte for byte, char in _byte_level_alphabet().items()}
# By character, -1 for one that stands for no byte; so does the last, and every character behind it.
_BYTES = np.full(max(map(ord, _BYTE_OF)) + 2, -1, np.int16)
_BYTES[[*map(ord, _BYTE_OF)]] = [*_BYTE_OF.values()]
