"""What a forward is given: one document per row, or several, told by keys, by positions or by the mask.

Invariant: a forward is ordinary only if nothing it is given can be read as several documents in a row. Everything that
speaks of documents must say the same; otherwise the forward is refused.

    positions 0 1 2 0 1 0   mask 1 1 1 1 1 0   documents of 3 and 2 tokens, one token of padding that nobody sees
    positions 1 1 0 1 2 3   mask 0 0 1 1 1 1   ordinary: among tokens that are not hidden, positions rise by one
    positions 0 1 2 7 8 9   mask none          refused: neither one document nor two that begin alike
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
import torch

from sft_plugins._rows import TREE_COLUMNS
from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.boundaries import (
    BOUNDARY_KEYS,
    Boundaries,
    documents_by_key,
    malformed,
    whole_number,
)
from sft_plugins.packing.isolation.masks import bad_numbers, describe, two_axes
from sft_plugins.packing.isolation.trees import take_trees

_OTHER_NAMES = frozenset(
    {"cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seq_lens", "max_seqlen", "max_seqlen_q", "max_seqlen_k"}
    | {"seq_lengths", "seq_lens", "seqlens", "document_ids", "segment_ids", "sequence_ids"}
)
"""What others call their boundaries. A forward that takes any argument would take these, and heed none of them."""

CACHES = ("cache", "past_key_values", "cache_params", "past_buckets_states", "mems", "state")
"""What models call the past that a row goes on from; `cache` since transformers 5.24."""


def refuse_other_names(arguments: MutableMapping[str, Any], parameters: Any) -> None:
    """Raise where boundaries came under a name that nothing reads.

    Raises:
        PackingError: `boundaries`.
    """
    for name in _OTHER_NAMES & arguments.keys():
        if arguments[name] is not None and name not in parameters:
            raise malformed(
                f"{name} came with the batch, and nothing reads it; expected {', '.join(BOUNDARY_KEYS)} or position_ids",
                remedy="pass cu_seq_lens_q and cu_seq_lens_k, or leave it out where each row is one document",
            )


def take_boundaries(
    arguments: MutableMapping[str, Any], *, rows: int, tokens: int, own_masks: bool = False
) -> Boundaries | None:
    """Pop what speaks of documents out of a forward's named arguments and return what it says.

    Of a packed forward the mask goes, `position_ids` are filled in and spread over the rows, and padding becomes documents
    of its own, none longer than the longest that is read.

    Args:
        arguments: the forward's arguments by name.
        rows, tokens: shape of the batch's `input_ids`.
        own_masks: masks of pairs come from the model's own code, in a forward that was found to be ordinary.

    Returns:
        None for an ordinary forward, whose arguments stay as they are (boundary keys that are None go).

    Raises:
        PackingError: `boundaries`, if keys, positions and mask contradict the shape or each other.
        ContaminationError: `mask_with_boundaries`, if the mask hides tokens inside a document, or is one of pairs;
            `bad_mask`, `block_mask`, if it can be read in no way, or tells documents apart by itself;
            `cache_with_boundaries`, if a cache came along.
    """
    popped = {key: arguments.pop(key) for key in (*BOUNDARY_KEYS, *TREE_COLUMNS) if key in arguments}
    given = {key: value for key, value in popped.items() if value is not None}
    mask, cache = arguments.get("attention_mask"), [name for name in CACHES if arguments.get(name) is not None]
    if not given and (not tokens or (tokens == 1 and (cache or mask is None))):
        return None  # generation's single tokens, or none: that is no two documents
    if given.keys() & set(TREE_COLUMNS):
        if cache:
            raise _cached(cache[0])
        return take_trees(given, arguments, rows=rows, tokens=tokens)
    positions = _read_positions(arguments.get("position_ids"), rows, tokens)
    flat = two_axes(mask, rows=rows, tokens=tokens, cached=bool(cache), own=own_masks)
    if not given and _plainly_ordinary(positions, flat):
        return None

    read = _Reading(given, positions, flat, rows, tokens)
    if not read.row.size:
        raise bad_numbers(
            "attention_mask hides every token of the batch; of additive masks only those of pairs are read"
        )
    if not read.packed:
        return None
    if mask is not None and flat is None:
        raise ContaminationError(
            f"attention_mask {describe(mask)} came together with documents in a row",
            code="mask_with_boundaries",
            remedy="leave attention_mask out: the documents say all it could, and under a mask of pairs every layer sees "
            "as far as the mask goes",
        )
    if cache:
        raise _cached(cache[0])
    boundaries = read.boundaries()
    if mask is not None:
        arguments["attention_mask"] = None
    arguments["position_ids"] = read.position_ids(boundaries, arguments)
    return boundaries


def _cached(name: str) -> ContaminationError:
    return ContaminationError(
        f"{name} came together with documents in a row, which neither go on from a cache nor leave one",
        code="cache_with_boundaries",
        remedy=f"leave {name} out; generate from prompts in rows of their own. Prefix tuning cannot be packed",
    )


def _plainly_ordinary(positions: torch.Tensor | None, mask: torch.Tensor | None) -> bool:
    """Whether each row is one document with padding at its ends. One comparison on the device; False is for a closer look."""
    signs = []
    if mask is not None and mask.dtype is not torch.bool:
        signs.append(((mask == 0) | (mask == 1)).all())
    if positions is not None:
        before, after = positions[:, :, :-1], positions[:, :, 1:]
        goes_on = (after == before + 1)[0] if len(positions) == 1 else _goes_on(before, after)
        if mask is not None:
            seen = mask != 0
            goes_on = goes_on | ~(seen[:, 1:] & seen[:, :-1])
            stretches = (seen[:, 1:] & ~seen[:, :-1]).sum(1) + seen[:, 0]
            signs += [(stretches <= 1).all(), seen.any()]
        signs.append(goes_on.all())
    return not signs or bool(torch.stack(signs).all())


def _goes_on(before: Any, after: Any) -> Any:
    """Whether a token goes on the document of the one before, by positions of several axes (time, height, width).

    Inside an image height and width fall back with every line; time never does, and no two tokens share a place.
    """
    return (after[0] >= before[0]) & (after != before).any(0)


class _Reading:
    """Everything that speaks of documents, on the host, compared between each visible token and the one before it."""

    def __init__(
        self,
        given: dict[str, Any],
        positions: torch.Tensor | None,
        mask: torch.Tensor | None,
        rows: int,
        tokens: int,
    ) -> None:
        self.given, self.shape = given, (rows, tokens)
        self._positions = positions
        self.positions = None if positions is None else _on_host(positions)
        numbers = None if mask is None else _mask_numbers(mask)
        self.visible = np.ones(self.shape, dtype=bool) if numbers is None else numbers != 0
        self.row, self.index = np.nonzero(self.visible)
        self.is_pair = self.row[1:] == self.row[:-1]
        self.pair = (self.row[1:][self.is_pair], self.index[:-1][self.is_pair], self.index[1:][self.is_pair])
        said = self._said(numbers)
        self.packed = bool(given) or (numbers is not None and numbers.max(initial=0) > 1)
        self.packed |= any(bool(begins.any()) for begins in said.values())
        self.begins = self._agreed(said)

    def _said(self, numbers: np.ndarray | None) -> dict[str, np.ndarray]:
        """For each that speaks of documents, whether one begins between the two tokens of a pair."""
        row, before, after = self.pair
        said = {}
        for key, document in documents_by_key(self.given, *self.shape).items():
            said[key] = document[row, before] != document[row, after]
        if numbers is not None and numbers.max(initial=0) > 1:
            said["attention_mask"] = numbers[row, before] != numbers[row, after]
        if self.positions is not None:
            a, b = self.positions[:, row, before], self.positions[:, row, after]
            if len(a) == 1:
                # Over hidden tokens positions count those, or do not.
                said["position_ids"] = ~((b == a + 1) | (b == a + after - before))[0]
            else:
                said["position_ids"] = ~_goes_on(a, b)
        return said

    def _agreed(self, said: dict[str, np.ndarray]) -> np.ndarray:
        if not said:
            if self.given:
                raise malformed(
                    f"{' and '.join(self.given)} came alone, and say nothing of where documents begin",
                    remedy="pass cu_seq_lens_q and cu_seq_lens_k with them, or leave them out",
                )
            return np.zeros(self.pair[0].size, dtype=bool)
        (name, begins), *others = said.items()
        for other, differs in ((other, np.flatnonzero(begins != one)) for other, one in others):
            if differs.size:
                row, before, after = (int(part[differs[0]]) for part in self.pair)
                yes, no = (name, other) if begins[differs[0]] else (other, name)
                raise malformed(
                    f"{name} and {other} differ: {yes} begins a document between tokens {before} and {after} of row {row}, "
                    f"and {no} does not"
                )
        return begins

    def boundaries(self) -> Boundaries:
        """Documents as far as they are visible, and padding as documents of its own."""
        row, before, after = self.pair
        if (holes := np.flatnonzero(~self.begins & (after > before + 1))).size:
            raise ContaminationError(
                f"attention_mask hides tokens inside a document, behind token {before[holes[0]]} of row {row[holes[0]]}",
                code="mask_with_boundaries",
                remedy="cut hidden tokens out of the documents; padding may stand before and behind them",
            )
        starts = np.ones(self.row.size, dtype=bool)
        starts[1:][self.is_pair] = self.begins
        if self.positions is not None:
            places = self.positions[:, self.row, self.index][:, starts]
            if (places != places[:, :1]).any():
                raise malformed(
                    f"documents begin at positions {np.unique(places[0])[:6].tolist()}, expected one and the same for all",
                    remedy="let the positions of every document count up from 0; `undo()` of the isolation report runs the "
                    "model with positions of your own",
                )
        longest = int(np.diff(np.append(np.flatnonzero(starts), starts.size)).max())
        begins = np.zeros(self.shape, dtype=bool)
        begins[:, 0] = True
        begins[self.row[starts], self.index[starts]] = True
        if self.row.size < begins.size:
            hidden = ~self.visible
            first = hidden.copy()
            first[:, 1:] &= self.visible[:, :-1]
            column = np.arange(self.shape[1])
            into = column - np.maximum.accumulate(np.where(first, column, 0), axis=1)
            begins |= hidden & (into % longest == 0)
        boundaries = Boundaries(np.diff(np.append(np.flatnonzero(begins), begins.size)), self.shape[0])
        for key in ("max_length_q", "max_length_k"):
            if key in self.given and whole_number(self.given[key], key) < longest:
                raise malformed(f"{key} is {self.given[key]}, but the longest document has {longest} tokens")
        return boundaries

    def position_ids(self, boundaries: Boundaries, arguments: MutableMapping[str, Any]) -> torch.Tensor:
        """Positions as given; those of padding count like a document's, so that model code reads no boundary into them."""
        given = self._positions
        if given is None:
            return boundaries.position_ids(_device_of(arguments))
        if self.row.size < self.visible.size:
            start = given[:, int(self.row[0]), int(self.index[0])][:, None, None]
            counted = boundaries.position_ids(given.device) + start
            given = torch.where(torch.from_numpy(self.visible).to(given.device), given, counted)
        return given[0] if len(given) == 1 else given


def _read_positions(position_ids: Any, rows: int, tokens: int) -> torch.Tensor | None:
    """[axes, rows, tokens] out of [tokens], [1 or rows, tokens] or [axes, 1 or rows, tokens]."""
    if position_ids is None:
        return None
    if not isinstance(position_ids, torch.Tensor) or position_ids.is_complex() or position_ids.dtype is torch.bool:
        kind = position_ids.dtype if isinstance(position_ids, torch.Tensor) else type(position_ids).__name__
        raise malformed(f"position_ids must be a tensor of integers, got {kind}")
    shape = position_ids.shape
    fits = 1 <= len(shape) <= 3 and shape[-1] == tokens and (len(shape) == 1 or shape[-2] in (1, rows))
    if not fits:
        raise malformed(
            f"position_ids have shape {list(shape)}, the batch {[rows, tokens]}",
            remedy="pass position_ids [rows, tokens] (or [axes, rows, tokens], where the model takes several), or none",
        )
    axes = shape[0] if len(shape) == 3 else 1
    return position_ids.reshape(axes, -1, tokens).expand(axes, rows, tokens)


def _on_host(positions: torch.Tensor) -> np.ndarray:
    return (positions.double() if positions.is_floating_point() else positions).detach().cpu().numpy()


def _mask_numbers(mask: torch.Tensor) -> np.ndarray:
    """int64 [rows, tokens]: 0 hides; above 1 the numbers are those of documents."""
    numbers = mask.detach().cpu()
    whole = numbers.long()
    if bool((whole != numbers).any()) or bool((whole < 0).any()):
        raise bad_numbers(
            f"attention_mask holds {float(numbers[(whole != numbers) | (whole < 0)][0]):.3g}; expected 0 where a token is "
            "hidden, and 1, or the number of its document, where it is not"
        )
    return whole.numpy()


def _device_of(arguments: MutableMapping[str, Any]) -> torch.device:
    inputs = arguments.get("input_ids")
    return (inputs if inputs is not None else arguments["inputs_embeds"]).device
