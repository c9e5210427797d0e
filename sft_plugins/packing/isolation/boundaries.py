"""Where the documents of a packed forward begin and end.

Invariant: `Boundaries` that exist cover every token of their batch exactly once, and no document crosses a row.

    lengths 2, 4, 3  →  cu_seq_lens 0, 2, 6, 9   position_ids 0 1 0 1 2 3 0 1 2   seq_idx 0 0 1 1 1 1 2 2 2

Interface for backends
----------------------
`take_boundaries(arguments, rows=B, tokens=T)` pops the boundary keys out of a forward's named arguments and returns
`Boundaries`, or None for an ordinary forward (padded batch, generation). It reads, in this order, `cu_seq_lens_q/k`,
`seq_idx`, or `position_ids` that restart. `position_ids` stays in `arguments` (and is filled in where it was missing).

`Boundaries` covers B·T tokens, row-major; no document crosses a row. It offers `lengths`, `starts` (numpy), and on a
device `cu_seq_lens`, `position_ids`, `seq_idx`, all of them as the keys of a batch (`batch`), and `groups` (documents of
equal length together).

`forward.py` puts a backend on a model, calls it with the boundaries of each packed forward, and keeps them within reach
of every layer (`current_boundaries()`), through gradient checkpointing's recompute too.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from sft_plugins.errors import ContaminationError, PackingError

BOUNDARY_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Keys of a batch that say where documents end. `position_ids` may say it too, but every model reads those."""


class Group(NamedTuple):
    """Documents of one length."""

    length: int
    where: slice | torch.Tensor
    """Their packed positions: a slice where they lie side by side, else int64 [n·length]."""


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
            raise _malformed(f"document lengths must be one or more positive integers, got {lengths.tolist()[:8]}")
        if self.tokens % self.rows:
            raise _malformed(f"{self.tokens} tokens of documents do not fill {self.rows} equal rows")
        width = self.tokens // self.rows
        if self.rows > 1 and np.any(self.starts // width != (self.starts + lengths - 1) // width):
            raise _malformed(f"a document crosses the end of one of the {self.rows} rows of {width} tokens")

    @property
    def tokens(self) -> int:
        """Tokens of all rows together."""
        return int(self.lengths.sum())

    @property
    def starts(self) -> np.ndarray:
        """int64 [N]: first position of each document."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def max_length(self) -> int:
        return int(self.lengths.max())

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
        """Documents of equal length together, shortest first."""
        key = ("groups", torch.device(device))
        if key not in self.scratch:
            self.scratch[key] = [
                Group(int(length), self._where(self.starts[self.lengths == length], int(length), device))
                for length in np.unique(self.lengths)
            ]
        return self.scratch[key]

    def ungroup(self, device: torch.device | str) -> torch.Tensor | None:
        """int64 [T]: where each packed position went when the groups are laid end to end; None if nowhere else."""
        key = ("ungroup", torch.device(device))
        if key not in self.scratch:
            by_length = np.argsort(self.lengths, kind="stable")
            at = np.empty(self.lengths.size, dtype=np.int64)
            at[by_length] = np.cumsum(self.lengths[by_length]) - self.lengths[by_length]
            moved = np.repeat(at - self.starts, self.lengths)
            order = torch.from_numpy(np.arange(self.tokens) + moved).to(device)
            self.scratch[key] = order if moved.any() else None
        return self.scratch[key]

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


def take_boundaries(arguments: MutableMapping[str, Any], *, rows: int, tokens: int) -> Boundaries | None:
    """Pop the boundary keys out of a forward's named arguments and return what they say, validated.

    Args:
        arguments: the forward's arguments by name; the boundary keys leave it, restarting `position_ids` are added
            where boundaries came without.
        rows, tokens: shape of the batch's `input_ids`.

    Returns:
        None for an ordinary forward: no boundary key, and no `position_ids` that restart inside a row.

    Raises:
        PackingError: `boundaries`, if the keys contradict the shape, each other, or `position_ids`.
        ContaminationError: `mask_with_boundaries`, if an attention mask came along, which would switch the isolation of
            the model's own code off; `cache_with_boundaries`, if a filled cache came along.
    """
    given = {key: arguments.pop(key) for key in BOUNDARY_KEYS if key in arguments}
    mask, cache, positions = (arguments.get(key) for key in ("attention_mask", "past_key_values", "position_ids"))
    flat = positions if positions is not None and positions.ndim == 2 else None

    if given.get("cu_seq_lens_q", given.get("cu_seq_lens_k")) is not None:
        boundaries = Boundaries(_lengths_of_cu_seq_lens(given, total=rows * tokens), rows)
    elif given.get("seq_idx") is not None:
        boundaries = Boundaries(_run_lengths(given["seq_idx"], rows, tokens), rows)
    elif flat is not None and cache is None and flat.shape == (rows, tokens):
        restarts = _restart_lengths(flat)
        # A left-padded batch has positions that restart too; it comes with a mask that hides the padding.
        if restarts is None or (mask is not None and not _says_nothing(mask)):
            return None
        boundaries = Boundaries(restarts, rows)
    else:
        return None

    if mask is not None:
        raise ContaminationError(
            f"attention_mask {_describe(mask)} came together with document boundaries",
            code="mask_with_boundaries",
            remedy="drop attention_mask from packed batches: boundaries say all it could, and any mask switches the "
            "isolation of documents off",
        )
    if cache is not None:
        if not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0:
            raise ContaminationError(
                "past_key_values with tokens in it came together with document boundaries",
                code="cache_with_boundaries",
                remedy="pass whole documents, or no boundaries; prefix tuning cannot be packed",
            )
        arguments["past_key_values"] = None
    if positions is None:
        arguments["position_ids"] = boundaries.position_ids(_device_of(arguments))
    elif flat is not None:
        expected = boundaries.position_ids(flat.device)
        if flat.shape != expected.shape or not torch.equal(flat - flat[:1, :1], expected):
            raise _malformed("position_ids do not restart where the document boundaries say")
    return boundaries


def _lengths_of_cu_seq_lens(given: dict[str, Any], *, total: int) -> np.ndarray:
    ends = {key: _integers(given[key], key) for key in ("cu_seq_lens_q", "cu_seq_lens_k") if given.get(key) is not None}
    first, *others = ends.values()
    if any(not np.array_equal(first, other) for other in others):
        raise _malformed("cu_seq_lens_q and cu_seq_lens_k differ; documents attend to themselves alone")
    if first.size < 2 or first[0] != 0 or first[-1] != total:
        raise _malformed(f"cu_seq_lens must run from 0 to the {total} tokens of the batch, got {first.tolist()[:8]}…")
    lengths = np.diff(first)
    if lengths.min() < 1:
        raise _malformed("cu_seq_lens must increase; an empty or negative document was given")
    for key in ("max_length_q", "max_length_k"):
        if given.get(key) is not None and int(given[key]) < lengths.max():
            raise _malformed(f"{key} is {int(given[key])}, but the longest document has {lengths.max()} tokens")
    return lengths


def _run_lengths(seq_idx: torch.Tensor, rows: int, tokens: int) -> np.ndarray:
    """[[0, 0, 1, 1, 1]] → 2, 3: a document ends where the index changes or the row ends."""
    indices = _integers(seq_idx, "seq_idx", ndim=2)
    if indices.shape != (rows, tokens):
        raise _malformed(f"seq_idx has shape {list(indices.shape)}, the batch {[rows, tokens]}")
    begins = np.ones(indices.shape, dtype=bool)
    begins[:, 1:] = indices[:, 1:] != indices[:, :-1]
    return np.diff(np.append(np.flatnonzero(begins), indices.size))


def _restart_lengths(position_ids: torch.Tensor) -> np.ndarray | None:
    """[[0, 1, 0, 1, 2]] → 2, 3; None unless positions count up and, in some row, fall back to the first value."""
    steps_up = position_ids[:, 1:] == position_ids[:, :-1] + 1
    if bool(steps_up.all()):
        return None
    begins = np.ones(tuple(position_ids.shape), dtype=bool)
    begins[:, 1:] = ~steps_up.cpu().numpy()
    positions = position_ids.cpu().numpy()
    if np.any(positions[begins] != positions[0, 0]):
        return None
    return np.diff(np.append(np.flatnonzero(begins), begins.size))


def _says_nothing(mask: Any) -> bool:
    """Whether a mask hides no token (all ones, segment numbers); no padded batch whose positions restart has one."""
    return isinstance(mask, torch.Tensor) and mask.ndim == 2 and bool((mask != 0).all())


def _integers(values: Any, name: str, *, ndim: int = 1) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim != ndim or not np.issubdtype(array.dtype, np.integer):
        raise _malformed(f"{name} must be {ndim}-D integers, got {array.ndim}-D {array.dtype}")
    return array.astype(np.int64)


def _device_of(arguments: MutableMapping[str, Any]) -> torch.device:
    inputs = arguments.get("input_ids")
    return (inputs if inputs is not None else arguments["inputs_embeds"]).device


def _describe(mask: Any) -> str:
    return str(list(mask.shape)) if isinstance(mask, torch.Tensor) else type(mask).__name__


def _malformed(message: str) -> PackingError:
    return PackingError(
        message,
        code="boundaries",
        remedy="build packed batches with BlockDiagonalPackingCollator, or check the collator",
    )
