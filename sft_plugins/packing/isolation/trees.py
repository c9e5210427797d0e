"""Packed rows of trees: documents that begin alike, what they share kept once, each branch seeing the path to its fork.

Invariant: a branch sees exactly the tokens that its row has alone, in their order, and stands at the same positions.

    rows A B C D, A B E F    packed A B C D | B E F     lengths 4 3    depths 0 1    parents −1 0
                             B E F sees A, then itself: 0 | 4 5 6      position_ids 0 1 2 3 | 1 2 3

A branch's first token is its parent's, repeated, so that the plain loss of the next token is right as it stands.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sft_plugins._rows import TREE_COLUMNS, Segments
from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.boundaries import Boundaries, Group, integers, malformed, whole_number


@dataclass(frozen=True, eq=False, kw_only=True)
class Trees(Boundaries):
    """The documents of one packed row, in order, some of them branches of earlier ones.

    Args:
        lengths: int64 [N], tokens of each document's own.
        depths: int64 [N], how many tokens of its parent's path a branch sees; 0 of a root.
        parents: int64 [N], number of the document that each branches from; -1 of a root.

    Raises:
        PackingError: `boundaries`, if a branch stands before its parent, or at a place that its parent does not hold.
    """

    depths: np.ndarray
    parents: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depths", "parents"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64))
        if self.rows != 1:
            raise malformed(f"trees came in {self.rows} rows; expected one", remedy="flatten the batch to one row")
        if self.depths.shape != self.lengths.shape or self.parents.shape != self.lengths.shape:
            raise malformed(
                f"{self.depths.size} seq_depths and {self.parents.size} seq_parents came with {self.lengths.size} documents"
            )
        if (fault := self.segments.fault()) is not None:
            raise malformed(fault)

    @property
    def segments(self) -> Segments:
        return Segments(self.lengths, self.depths, self.parents)

    @property
    def path_lengths(self) -> np.ndarray:
        return self.depths + self.lengths

    def paths(self) -> list[np.ndarray]:
        """For each document the packed positions that its last token sees."""
        if "paths" not in self.scratch:
            self.scratch["paths"] = self.segments.paths()
        return self.scratch["paths"]

    def seen(self, device: torch.device | str) -> torch.Tensor:
        return self._on(device, "seen", np.concatenate(self.paths()))

    def own(self, device: torch.device | str) -> torch.Tensor:
        """int64 [T]: where each packed token stands among `seen`."""
        first = np.cumsum(self.path_lengths) - self.lengths
        return self._on(device, "own", np.arange(self.tokens) + np.repeat(first - self.starts, self.lengths))

    def cu_path_lens(self, device: torch.device | str) -> torch.Tensor:
        ends = np.concatenate([[0], np.cumsum(self.path_lengths)]).astype(np.int32)
        return self._on(device, "cu_path_lens", ends)

    def position_ids(self, device: torch.device | str) -> torch.Tensor:
        """int64 [1, T], counted along each path."""
        positions = np.arange(self.tokens) - np.repeat(self.starts - self.depths, self.lengths)
        return self._on(device, "position_ids", positions[None])

    def keys(self, device: torch.device | str) -> dict[str, Any]:
        """Where a host drops what it does not know, the two ends that are left differ, and the row is refused."""
        return {
            **super().keys(device),
            "cu_seq_lens_k": self.cu_path_lens(device),
            "max_length_q": int(self.lengths.max()),
            "seq_depths": self._on(device, "seq_depths", self.depths.astype(np.int32)),
            "seq_parents": self._on(device, "seq_parents", self.parents.astype(np.int32)),
        }

    def _shapes(self) -> np.ndarray:
        return self.lengths * (int(self.depths.max()) + 1) + self.depths

    def _group(self, members: np.ndarray, length: int, device: torch.device | str) -> Group:
        sees = np.concatenate([self.paths()[member] for member in members])
        where = self._where(self.starts[members], length, device)
        return Group(length, where, where if not self.depths[members[0]] else torch.from_numpy(sees).to(device))


def take_trees(given: dict[str, Any], arguments: MutableMapping[str, Any], *, rows: int, tokens: int) -> Trees:
    """The trees that the keys of a forward tell; everything that speaks of documents must say the same.

    Args:
        given: the keys that say where documents end.
        arguments: the forward's other arguments; `position_ids` are filled in, a mask that hides nothing leaves.
        rows, tokens: shape of the batch's `input_ids`.

    Raises:
        PackingError: `boundaries`.
        ContaminationError: `mask_with_boundaries`, `cache_with_boundaries`.
    """
    if missing := [key for key in ("cu_seq_lens_q", *TREE_COLUMNS) if key not in given]:
        raise malformed(f"{' and '.join(given)} came without {' and '.join(missing)}: where branches begin is lost")
    ends, depths, parents = (integers(given[key], key) for key in ("cu_seq_lens_q", *TREE_COLUMNS))
    if ends.size < 2 or ends[0] != 0 or ends[-1] != rows * tokens:
        raise malformed(f"cu_seq_lens_q must run from 0 to the {rows * tokens} tokens of the batch")
    trees = Trees(lengths=np.diff(ends), rows=rows, depths=depths, parents=parents)
    expected = trees.batch("cpu")
    for key, value in {**given, "position_ids": arguments.get("position_ids")}.items():
        if value is None:
            continue
        said = whole_number(value, key) if isinstance(expected[key], int) else torch.as_tensor(value).detach().cpu()
        differs = said != expected[key] if isinstance(said, int) else not torch.equal(said.long(), expected[key].long())
        if differs:
            raise malformed(f"{key} says something else of the trees than cu_seq_lens_q, seq_depths and seq_parents")
    mask = arguments.get("attention_mask")
    if mask is not None:
        if not (isinstance(mask, torch.Tensor) and mask.shape == (rows, tokens) and bool((mask == 1).all())):
            raise ContaminationError(
                "attention_mask came together with trees, whose branches see what no mask of tokens can say",
                code="mask_with_boundaries",
                remedy="leave attention_mask out",
            )
        arguments["attention_mask"] = None
    if arguments.get("position_ids") is None:
        inputs = arguments.get("input_ids")
        device = (inputs if inputs is not None else arguments["inputs_embeds"]).device
        arguments["position_ids"] = trees.position_ids(device)
    return trees
