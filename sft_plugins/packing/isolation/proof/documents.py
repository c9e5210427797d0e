"""The made-up documents of the proof.

first row       7 1 19 7 5 tokens, none of them special; the longest crosses every limit that is near
two rows        9 10 | 7 5 7: special ids inside, first and last; then three of the first row in another order
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sft_plugins.packing.isolation.proof.limits import AFFORDABLE, onsets, windows

CONTROL, TRAINED, SHORT = 3, (2, 3), (2, 4, 0)
"""Indices in the first row: the document of which one token is changed, those that are run backward, and those on both
sides of a lowered limit."""

_REORDERED = (3, 4, 0)
_SPECIAL_LENGTHS = (9, 10)
_TABLES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions", "context_length")


@dataclass(frozen=True)
class Documents:
    """Token ids int64 [1, l] each.

    Args:
        first: the first row. others: the same with every token changed.
        special: documents with the ids that begin, end and pad rows.
    """

    first: list[torch.Tensor]
    others: list[torch.Tensor]
    special: list[torch.Tensor]

    @property
    def reordered(self) -> list[int]:
        """Indices in the first row that make a row as long as `special` does."""
        return list(_REORDERED)


def documents_for(model: nn.Module) -> Documents:
    """Documents whose ids and lengths suit `model`, on its device."""
    device = next(model.parameters()).device
    ids, marks = _ordinary_ids(model), _marks(model)
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(ids), (1, length), generator=generator)
        shift = torch.randint(1, max(len(ids), 2), (1, length), generator=generator)
        return ids[chosen].to(device), ids[(chosen + shift) % len(ids)].to(device)

    first, others = zip(*(draw(length) for length in (7, 1, _longest(model), 7, 5)), strict=True)
    special = [draw(length)[0] for length in _SPECIAL_LENGTHS]
    for document in special:
        for index, mark in enumerate(marks):
            document[0, 3 + index % 4] = mark
        if marks:
            document[0, 0], document[0, -1] = marks[0], marks[-1]
    return Documents(list(first), list(others), special)


def _longest(model: nn.Module) -> int:
    """Long enough to cross every near window or chunk twice, every other near limit once, and to fit the model."""
    text = _text_config(model)
    near = [2 * size + 3 for size in windows(model).values() if size <= AFFORDABLE]
    near += [size + 3 for size in onsets(model).values() if size <= AFFORDABLE]
    wanted = max([19, *near])
    grows = "max_position_embeddings" in onsets(model)
    tables = [size for name in _TABLES if type(size := getattr(text, name, None)) is int and size > 1 and not grows]
    return min([wanted, *tables])


def _marks(model: nn.Module) -> list[int]:
    """Ids that begin, end and pad a row, in this order: as real rows have them inside."""
    size, found = model.get_input_embeddings().weight.shape[0], []
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        for config in (_text_config(model), getattr(model, "generation_config", None)):
            value = getattr(config, name, None)
            found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)]
    return [v for v in dict.fromkeys(found) if 0 <= v < size]


def _ordinary_ids(model: nn.Module) -> torch.Tensor:
    """Token ids without a meaning of their own for the model's code (padding, images …)."""
    special: set[int] = set()
    for config in (model.config, getattr(model.config, "text_config", None)):
        for name, value in vars(config).items() if config is not None else ():
            if name.endswith(("_token_id", "_token_index", "_token_ids")):
                special |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [i for i in range(min(vocabulary, 4096)) if i not in special]
    return torch.tensor(ids if len(ids) > 1 else list(range(vocabulary)))


def _text_config(model: nn.Module) -> object:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
