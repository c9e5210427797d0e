"""What a packed row costs: one term for its tokens, one for the attention within its documents.

Invariant: the cost of a row depends on its `seq_lengths` (and `seq_depths`) alone; no token is read.

    seq_lengths [3, 2], linear 10, quadratic 1                        →   10·(3 + 2) + 3² + 2² = 63
    of a tree: seq_lengths [4, 4], seq_depths [0, 1]                  →   10·(4 + 3) + 4² + (4² − 1²) = 101
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from torch import nn
from transformers.pytorch_utils import Conv1D

from sft_plugins._models import causal_lm_of
from sft_plugins._options import stored_rows
from sft_plugins.errors import PackingError
from sft_plugins.packing.arrow import TokenColumn


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """What a packed row costs, in any unit: `linear`·Σ l + `quadratic`·Σ l² over its documents of l tokens.

    The first term is all that works token by token (projections, LM head), the second is attention. The default sees
    attention alone; in small models and short rows the first dominates, and then there is less to gain: `RowCost.of`.
    """

    linear: float = 0.0
    quadratic: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.linear < np.inf and 0 <= self.quadratic < np.inf and self.linear + self.quadratic > 0):
            raise PackingError(
                f"linear is {self.linear!r} and quadratic {self.quadratic!r}; expected two numbers from 0 on, not both 0",
                code="bad_option",
            )

    @classmethod
    def of(cls, model: nn.Module) -> RowCost:
        """Multiply-adds × 2 of one forward of a dense decoder with full attention, plain or under PEFT.

            linear = 2 · Σ weights of all linear layers      quadratic = 2 · layers · heads · head size

        (Scores and their sum over values are 2·l² each per head and unit of head size, half of it masked.) Operations are
        not seconds: attention kernels reach a smaller share of a card's rate than matrix products, so where both were
        timed, pass those. A layer with a sliding window costs less than counted here.

        Raises:
            PackingError: `bad_option` for a mixture of experts or a model without attention heads: give the two numbers.
        """
        lm = causal_lm_of(model)
        config = lm.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        if heads is None or getattr(config, "num_experts_per_tok", None):
            raise PackingError(
                f"{type(lm).__name__} is no dense decoder with attention, so its cost cannot be read off its layers",
                code="bad_option",
                remedy="pass RowCost(linear=…, quadratic=…), seconds per token and per token² from two timed rows, say",
            )
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        linear = sum(
            module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()
            for module in lm.modules()
            if isinstance(module, (nn.Linear, Conv1D))
        )
        return cls(linear=2.0 * linear, quadratic=2.0 * config.num_hidden_layers * heads * size)

    def per_row(self, packed: Dataset) -> npt.NDArray[np.float64]:
        """Cost of every row of `packed`, `[rows]`, from `seq_lengths` alone."""
        column = TokenColumn.of(packed, "seq_lengths")
        if not column.length.all():
            row = int(np.argmin(column.length))
            raise PackingError("seq_lengths is empty: the row has no documents", code="boundaries", row=row)
        lengths = column.gather(np.arange(len(packed)), column.length).astype(np.float64)
        costs = self._cost(lengths)
        if (
            "seq_depths" in packed.column_names
        ):  # of trees: a branch sees the path to its fork, and does not compute it again
            depths = TokenColumn.of(packed, "seq_depths").gather(np.arange(len(packed)), column.length)
            costs -= self._cost(depths.astype(np.float64))
        # documents per row [2, 1]   →   rows start at documents [0, 2]
        starts = np.cumsum(column.length) - column.length
        return np.add.reduceat(costs, starts)

    def _cost(self, lengths: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return (self.linear + self.quadratic * lengths) * lengths


def packed_rows(packed: Dataset, *, call: str) -> Dataset:
    """`packed`, if it is a data set of packed rows.

    Raises:
        PackingError: `streaming_dataset`, `bad_schema`.
    """
    stored_rows(packed, PackingError, call=call, stream="pack with pack_dataset, not as a stream", transforms=True)
    if "seq_lengths" not in packed.column_names:
        raise PackingError(
            f"there is no 'seq_lengths', so the rows are not packed; found {', '.join(packed.column_names) or 'nothing'}",
            code="bad_schema",
            remedy="pack them first, `pack_dataset(rows, max_length)`",
        )
    return packed
