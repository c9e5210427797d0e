"""Whether a batch of a host's own data loader holds the rows that it was made of: ids, labels, order, lengths.

rows 5 6 7 | 8 9    padded [5 6 7, 8 9 0] with attention_mask [1 1 1, 1 1 0]    flattened [5 6 7 8 9] without
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sft_plugins._constants import IGNORE_INDEX


def difference(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """How `batch` differs from `rows` (`input_ids`, `labels`), one after the other; None where it does not.

    Without an attention mask the batch is one flat row; with one, what it hides is padding, and must carry no loss.
    """
    mask = batch.get("attention_mask")
    for name in ("input_ids", "labels"):
        held = np.asarray(batch[name])
        wanted = np.concatenate([np.asarray(row[name]) for row in rows])
        real = np.ones(held.shape, bool) if mask is None else np.asarray(mask).astype(bool)
        found = held[real]
        if len(found) != len(wanted):
            return f"`{name}` has {len(found):,} entries for {len(wanted):,}"
        unlike = np.flatnonzero(found != wanted)
        if len(unlike):
            at = int(unlike[0])
            return f"{len(unlike):,} entries of `{name}` differ, the first is {int(found[at])} for {int(wanted[at])}"
        if mask is not None and real.sum(1).tolist() != [len(row[name]) for row in rows]:
            return f"rows of `{name}` have other lengths"
        if name == "labels" and (held[~real] != IGNORE_INDEX).any():
            return "padding carries loss"
    return None
