"""Attention temperatures that a model takes from the place in the row, put right for each document.

    Llama 4, floor_scale 8192, documents of 8,000 and 500 tokens: from the 192nd token on the second got the queries of a
    document that is 8,192 tokens long

The layer has multiplied its queries by the temperature of their place; here they get that of their position in the
document instead. Rows shorter than the first step have one temperature, and are left alone.
"""

from __future__ import annotations

import torch
from torch import nn

from sft_plugins.packing.isolation.boundaries import Boundaries


def of_the_document(module: nn.Module, query: torch.Tensor, boundaries: Boundaries) -> torch.Tensor:
    """Queries [B, H, T, D] of an attention layer as it makes them where their document stands alone."""
    floor = getattr(module, "floor_scale", None)
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True) or not floor:
        return query
    rows, _, width, _ = query.shape
    if width < floor:
        return query
    place = torch.arange(width, device=query.device).expand(rows, width)
    positions = boundaries.position_ids(query.device)

    def temperature(at: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.floor((at.float() + 1.0) / floor)) * module.attn_scale + 1.0

    return (query * (temperature(positions) / temperature(place))[:, None, :, None]).to(query.dtype)
