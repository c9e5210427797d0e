"""A narrow twin keeps the first layer of every kind, in order, and two layers where all are of one."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from sft_plugins.preflight.tiny_model.narrow import narrow

FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("kinds", "kept"),
    [
        ([FULL] * 6, [FULL, FULL]),  # one layer would show nothing that is handed from layer to layer
        ([SLIDING, SLIDING, FULL, SLIDING, FULL], [SLIDING, FULL]),
        ([FULL, SLIDING, SLIDING], [FULL, SLIDING]),
    ],
)
def test_the_first_layer_of_every_kind_is_kept(kinds: list[str], kept: list[str]) -> None:
    config = AutoConfig.for_model("qwen3", num_hidden_layers=len(kinds), layer_types=kinds, sliding_window=64)
    twin = narrow(config, layers="kinds")
    assert twin.layer_types == kept
    assert twin.num_hidden_layers == len(kept)
