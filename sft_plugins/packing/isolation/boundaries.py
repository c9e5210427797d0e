"""Where the documents of a packed forward begin and end.

Invariant: `Boundaries` that exist cover every token of their batch exactly once, and no document crosses a row.

    lengths 2, 4, 3  →  cu_seq_lens 0, 2, 6, 9   position_ids 0 1 0 1 2 3 0 1 2   seq_idx 0 0 1 1 1 1 2 2 2

Interface for backends
----------------------
`Boundaries` covers B·T tokens, row-major; no document crosses a row. It offers `lengths`, `starts` (numpy), and on a
device `cu_seq_lens`, `position_ids`, `seq_idx`, all of them as the keys of a batch (`batch`), and `groups` (documents of
equal length together).

`reading.py` finds them in what a forward is given. `forward.py` puts a backend on a model, calls it with the boundaries
of each packed forward, and keeps them within reach of every layer (`current_boundaries()`), through gradient
checkpointing's recompute too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from sft_plugins.errors import PackingError

BOUNDARY_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Keys of a batch that say where documents end. `position_ids` may say it too, but every model reads those."""


class Group(NamedTuple):
    """Documents of one shape."""

    length: int
    where: slice | torch.Tensor
    """Their packed positions: a slice where they lie side by side, else int64 [n·length]."""
    sees: slice | torch.Tensor
    """Packed positions that they see, their own last: `where`, but for branches of a tree."""


@dataclass(frozen=True, eq=False)
class Boundaries:
    """The documents of one packed forward, in order.

    Args:
        lengths: int64 [N], tokens per document, each at least 1.
        rows: rows of the batch; the documents fill rows of equal length one after the other.
        scratch: what is worked out once per forward (tensors on the device, a backend's notes); it lives as long as the
            forward's graph.

    Raises:
        PackingError: `boundaries`, if a length is below 1, or a document crosses the end of a row.
    """

    lengths: np.ndarray
    rows: int = 1
    scratch: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        lengths = np.asarray(self.lengths, dtype=np.int64)
        object.__setattr__(self, "lengths", lengths)
        if lengths.ndim != 1 or lengths.size == 0 or lengths.min() < 1:
            raise malformed(f"document lengths must be one or more positive integers, got {lengths.tolist()[:8]}")
        if self.tokens % self.rows:
            raise malformed(f"{self.tokens} tokens of documents do not fill {self.rows} equal rows")
        width = self.tokens // self.rows
        if self.rows > 1 and np.any(self.starts // width != (self.starts + lengths - 1) // width):
            raise malformed(f"a document crosses the end of one of the {self.rows} rows of {width} tokens")

    @property
    def tokens(self) -> int:
        """Tokens of all rows together."""
        return int(self.lengths.sum())

    @property
    def starts(self) -> np.ndarray:
        """int64 [N]: first position of each document."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def path_lengths(self) -> np.ndarray:
        """int64 [N]: tokens that the last token of each document sees, itself included."""
        return self.lengths

    @property
    def max_length(self) -> int:
        """Tokens of the longest document that stands anywhere for itself: its path, where it is a branch."""
        return int(self.path_lengths.max())

    def seen(self, device: torch.device | str) -> torch.Tensor | None:  # noqa: ARG002
        """int64 [Σ path_lengths]: packed positions that each document sees, end to end; None where that is its own."""
        return None

    def cu_path_lens(self, device: torch.device | str) -> torch.Tensor:
        """int32 [N+1]: where the documents end in `seen`."""
        return self.cu_seq_lens(device)

    def cu_seq_lens(self, device: torch.device | str) -> torch.Tensor:
        """int32 [N+1]."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        return self._on(device, "cu_seq_lens", ends)

    def position_ids(self, device: torch.device | str) -> torch.Tensor:
        """int64 [rows, T/rows], restarting at 0 with every document."""
        positions = np.arange(self.tokens) - np.repeat(self.starts, self.lengths)
        return self._on(device, "position_ids", positions.reshape(self.rows, -1))

    def seq_idx(self, device: torch.device | str) -> torch.Tensor:
        """int32 [rows, T/rows]: which document each token belongs to."""
        indices = np.repeat(np.arange(self.lengths.size, dtype=np.int32), self.lengths)
        return self._on(device, "seq_idx", indices.reshape(self.rows, -1))

    def keys(self, device: torch.device | str) -> dict[str, Any]:
        """What `BOUNDARY_KEYS` name."""
        ends, longest = self.cu_seq_lens(device), self.max_length
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": self.seq_idx(device),
        }

    def batch(self, device: torch.device | str) -> dict[str, Any]:
        """Every key of a packed batch that says where documents end."""
        return {"position_ids": self.position_ids(device), **self.keys(device)}

    def groups(self, device: torch.device | str) -> list[Group]:
        """Documents of equal shape together, shortest first."""
        key = ("groups", torch.device(device))
        if key not in self.scratch:
            shapes, first = np.unique(self._shapes(), return_index=True)
            self.scratch[key] = [
                self._group(np.flatnonzero(self._shapes() == shape), int(self.lengths[at]), device)
                for shape, at in zip(shapes, first, strict=True)
            ]
        return self.scratch[key]

    def ungroup(self, device: torch.device | str) -> torch.Tensor | None:
        """int64 [T]: where each packed position went when the groups are laid end to end; None if nowhere else."""
        key = ("ungroup", torch.device(device))
        if key not in self.scratch:
            by_shape = np.argsort(self._shapes(), kind="stable")
            at = np.empty(self.lengths.size, dtype=np.int64)
            at[by_shape] = np.cumsum(self.lengths[by_shape]) - self.lengths[by_shape]
            moved = np.repeat(at - self.starts, self.lengths)
            order = torch.from_numpy(np.arange(self.tokens) + moved).to(device)
            self.scratch[key] = order if moved.any() else None
        return self.scratch[key]

    def _shapes(self) -> np.ndarray:
        """[N]: documents of equal value are attended to in one call."""
        return self.lengths

    def _group(self, members: np.ndarray, length: int, device: torch.device | str) -> Group:
        where = self._where(self.starts[members], length, device)
        return Group(length, where, where)

    @staticmethod
    def _where(starts: np.ndarray, length: int, device: torch.device | str) -> slice | torch.Tensor:
        if np.all(np.diff(starts) == length):
            return slice(int(starts[0]), int(starts[-1]) + length)
        return torch.from_numpy((starts[:, None] + np.arange(length)).ravel()).to(device)

    def _on(self, device: torch.device | str, name: str, values: np.ndarray) -> torch.Tensor:
        key = (name, torch.device(device))
        if key not in self.scratch:
            self.scratch[key] = torch.from_numpy(np.ascontiguousarray(values)).to(device)
        return self.scratch[key]


def documents_by_key(given: dict[str, Any], rows: int, tokens: int) -> dict[str, np.ndarray]:
    """For each key that tells documents apart, the number of each token's document [rows, tokens]."""
    said: dict[str, np.ndarray] = {}
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if key in given:
            lengths = _lengths_of_cu_seq_lens(given[key], key, total=rows * tokens)
            Boundaries(lengths, rows)  # no document crosses a row
            said[key] = np.repeat(np.arange(lengths.size), lengths).reshape(rows, tokens)
    if "seq_idx" in given:
        said["seq_idx"] = integers(given["seq_idx"], "seq_idx", ndim=2)
        if said["seq_idx"].shape != (rows, tokens):
            raise malformed(f"seq_idx has shape {list(said['seq_idx'].shape)}, the batch {[rows, tokens]}")
    return said


def _lengths_of_cu_seq_lens(value: Any, key: str, *, total: int) -> np.ndarray:
    ends = integers(value, key)
    if ends.size < 2 or ends[0] != 0 or ends[-1] != total:
        raise malformed(f"{key} must run from 0 to the {total} tokens of the batch, got {ends.tolist()[:8]}…")
    lengths = np.diff(ends)
    if lengths.min() < 1:
        raise malformed(f"{key} must increase; an empty or negative document was given")
    return lengths


def integers(values: Any, name: str, *, ndim: int = 1) -> np.ndarray:
    """int64 array of `ndim` axes."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim != ndim or not np.issubdtype(array.dtype, np.integer):
        raise malformed(f"{name} must be {ndim}-D integers, got {array.ndim}-D {array.dtype}")
    return array.astype(np.int64)


def whole_number(value: Any, name: str) -> int:
    """`value`, or a scalar tensor's, as a number."""
    try:
        return int(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise malformed(f"{name} must be a whole number, got {value!r}") from error


def malformed(message: str, *, remedy: str = "") -> PackingError:
    """What is said about documents describes no row, or is said in two ways that differ."""
    return PackingError(
        message,
        code="boundaries",
        remedy=remedy or "build packed batches with BlockDiagonalPackingCollator, or check the collator",
    )
