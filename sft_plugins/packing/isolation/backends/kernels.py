"""Attention of documents that lie end to end in one row, each to itself alone.

Invariant: no score between two documents is ever computed, and memory follows the longest document, never T × T.

    lengths 2, 3, 2  →  one call on [2, H, 2, D] (documents 0 and 2), one on [1, H, 3, D] (document 1)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sft_plugins.packing.isolation.boundaries import Boundaries


@dataclass(frozen=True)
class Rule:
    """Which earlier tokens of its own document a token sees: all of them, the last `window` (itself included), or those
    of its own chunk of `chunk` tokens, counted from the document's start."""

    window: int | None = None
    chunk: int | None = None

    def sees_all(self, length: int) -> bool:
        """Whether this is plain causal attention for a document of `length` tokens."""
        return all(limit is None or limit >= length for limit in (self.window, self.chunk))

    def mask(self, queries: int, keys: int, device: torch.device) -> torch.Tensor:
        """bool [queries, keys], True where a query (row) sees a key (column); the last query stands at the last key."""
        index = torch.arange(keys, device=device)
        query, key = index[keys - queries :, None], index[None, :]
        seen = key <= query
        if self.window is not None:
            seen &= key > query - self.window
        if self.chunk is not None:
            seen &= key // self.chunk == query // self.chunk
        return seen


KERNEL_DEVICES = frozenset({"cuda"})
"""Types of device that torch has a variable-length kernel for."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""query [n, H, l, D], key [n, Hk, p, D], value [n, Hk, p, Dv] → [n, l, H, Dv]; the queries stand at the last l keys."""


def per_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, boundaries: Boundaries, attend: Attend
) -> torch.Tensor:
    """Attention of each document to what it sees, documents of equal shape in one call of `attend`.

    Naive equivalent: `torch.cat([attend(*(x[:, :, a:b] for x in (query, key, value))) for a, b in documents], dim=1)`.

    Args:
        query: [B, H, T, D]; key: [B, Hk, T, D]; value: [B, Hk, T, Dv].
        boundaries: of the B·T tokens, row-major.
        attend: causal attention of a batch of whole documents.

    Returns:
        [B, T, H, Dv].
    """
    rows, _, width, _ = query.shape
    tokens = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]  # [B·T, heads, D]
    groups = boundaries.groups(query.device)
    branches = [sees for _, where, sees in groups if sees is not where and isinstance(sees, torch.Tensor)]
    gathered: list[Iterator[torch.Tensor]] = []
    if branches:  # of all branches at once: the backward of a gather fills a row of zeros, however little was taken
        sizes, index = [len(sees) for sees in branches], torch.cat(branches)
        gathered = [iter(states[index].split(sizes)) for states in tokens[1:]]
    outputs = []
    for length, where, sees in groups:
        own = tokens[0][where].unflatten(0, (-1, length))
        taken = [states[where] for states in tokens[1:]] if sees is where else [next(paths) for paths in gathered]
        seen = [states.unflatten(0, (len(own), -1)).transpose(1, 2) for states in taken]
        outputs.append(attend(own.transpose(1, 2), *seen).flatten(0, 1))
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    order = boundaries.ungroup(query.device)
    return (packed if order is None else packed[order]).unflatten(0, (rows, width))


def varlen_supports(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, rule: Rule, longest: int, dropout: float
) -> bool:
    """Whether torch's own variable-length kernel computes exactly this attention: half precision on CUDA, head sizes
    alike, at most 256 and multiples of 8, no dropout, no chunks."""
    return (
        query.device.type in KERNEL_DEVICES
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and dropout == 0.0
        and (rule.chunk is None or rule.chunk >= longest)
        and "window_size" in _varlen_parameters()
    )


def varlen_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    boundaries: Boundaries,
    rule: Rule,
    scale: float | None = None,
) -> dict[str, Any]:
    """Arguments of `torch.nn.attention.varlen.varlen_attn` for packed states of [B, heads, T, D]."""
    ends, path_ends, seen = (
        boundaries.cu_seq_lens(query.device),
        boundaries.cu_path_lens(query.device),
        boundaries.seen(query.device),
    )
    longest, longest_own = boundaries.max_length, int(boundaries.lengths.max())
    # The kernel counts the tokens to the left of a query; `Rule.window` counts the query too. (-1, 0) is plain causal.
    left = -1 if rule.window is None or rule.window >= longest else rule.window - 1
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    if seen is not None:
        key, value = key[seen], value[seen]
    arguments: dict[str, Any] = {"cu_seq_q": ends, "cu_seq_k": path_ends, "max_q": longest_own, "max_k": longest}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _varlen_parameters():
            arguments["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return {"query": query, "key": key, "value": value, **arguments, "scale": scale, "window_size": (left, 0)}


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    boundaries: Boundaries,
    rule: Rule,
    scale: float | None,
) -> torch.Tensor:
    """All documents in one call of torch's variable-length kernel; [B, T, H, D]. Ask `varlen_supports` first."""
    from torch.nn.attention.varlen import varlen_attn

    rows, _, width, _ = query.shape
    attended = varlen_attn(**varlen_arguments(query, key, value, boundaries=boundaries, rule=rule, scale=scale))
    return attended.unflatten(0, (rows, width))


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """Parameters of this torch's variable-length attention; none where it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)
