"""What an attention mask says: which tokens it hides, and whether it tells documents apart.

Invariant: a mask is read in one way or refused. Nothing it says is dropped.

    1 1 1 1 0 0   hides two tokens                    1 1 2 2 2 0   documents of 2 and 3 tokens, one token hidden
    [B, 1, T, T]  ordinary only if every token sees all earlier ones that are not hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sft_plugins.errors import ContaminationError

_HIDDEN_BELOW = -1000.0
"""Additive masks hide with −1e4 or less, the biases of distance that models add are smaller."""


def two_axes(mask: Any, *, rows: int, tokens: int, cached: bool, own: bool) -> torch.Tensor | None:
    """The mask of this forward's own tokens, [rows, tokens]; None where there is none, or one of pairs that hides nothing
    but padding and later tokens.

    Raises:
        ContaminationError: `bad_mask` for a form that cannot be read; `block_mask` for pairs that hide earlier tokens.
    """
    if mask is None:
        return None
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        # In front of a forward's own tokens a mask has those of the cache, in a static cache room behind them.
        fits = mask.shape[0] in (1, rows) and (mask.shape[1] == tokens or (cached and mask.shape[1] > tokens))
        if not fits:
            raise _bad_mask(f"attention_mask has shape {list(mask.shape)}, the batch {[rows, tokens]}")
        return mask[:, -tokens:].expand(rows, tokens)
    if cached or own:
        return None  # generation's or the model's own masks of pairs, windows and chunks included
    for part in mask.values() if isinstance(mask, Mapping) else (mask,):
        if part is not None:
            _refuse_blocks(part, tokens)
    return None


def _refuse_blocks(mask: Any, tokens: int) -> None:
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (3, 4) or mask.shape[-2:] != (tokens, tokens):
        raise _bad_mask(f"attention_mask is {describe(mask)}, the batch has rows of {tokens} tokens")
    sees = mask > _HIDDEN_BELOW if mask.is_floating_point() else mask != 0
    own = sees.diagonal(dim1=-2, dim2=-1)
    hidden = ~sees & own[..., :, None] & own[..., None, :]
    if bool(hidden.tril(-1).any()):
        raise ContaminationError(
            f"attention_mask {describe(mask)} keeps tokens from seeing earlier ones, as documents in one row do; layers "
            "with a window or a state of their own would not follow it",
            code="block_mask",
            remedy="leave the mask out and pass position_ids that restart with every document (or cu_seq_lens_q and "
            "cu_seq_lens_k); `undo()` of the isolation report runs the model with masks of your own",
        )


def bad_numbers(message: str) -> ContaminationError:
    """Numbers that neither hide a token nor count a document."""
    return _bad_mask(message)


def describe(mask: Any) -> str:
    """The shape of a mask, or what it is instead."""
    return str(list(mask.shape)) if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"


def _bad_mask(message: str) -> ContaminationError:
    return ContaminationError(
        message,
        code="bad_mask",
        remedy="pass attention_mask [rows, tokens] of 1 for tokens and 0 for padding, or none",
    )
