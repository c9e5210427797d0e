"""Numbers of tokens at which a model changes its ways: windows, chunks, original lengths, temperatures that set in.

Invariant: `lowered` leaves no trace; the model's limits are its own again when it ends.

A document of the probe is short, and a window of 4,096 tokens or a temperature that begins at 8,192 would never be reached.
The code that handles them does not depend on the number, so the probe lowers the number and crosses it.

    floor_scale = 8192  →  7, in the configuration and in the layers; documents of 5 and 19 tokens lie on both sides
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from sft_plugins.errors import ContaminationError

LOWERED = 7
"""What limits out of reach are lowered to: a divisor of no document's length but its own."""

AFFORDABLE = 64
"""Limits up to this size are crossed as they are."""

_WINDOW = re.compile(r"(sliding|local_attention|attention)?_?window(_size)?|attention_chunk_size|keep_window_size")
_ONSET = re.compile(r"original_max_seq_len|floor_scale|(log_scaling_)?n_floor|index_topk")
_ORIGINAL, _TEMPERATURE = "original_max_position_embeddings", "llama_4_scaling_beta"
_GROWTH = ("max_position_embeddings", "max_seq_len_cached")
"""Limits of dynamic scaling. Elsewhere they are sizes of tables, which nothing but an error lies beyond."""

_BY_PLACE = ("use_logn_attn", "use_dynamic_ntk")
"""Switches of code published with weights (Qwen 1): scores scaled by the place in the row, frequencies by its length."""


def windows(model: nn.Module) -> dict[str, int]:
    """Windows and chunks that the text configuration names: `{"sliding_window": 4096}`."""
    return {name: value for name, value in _named(model).items() if _WINDOW.fullmatch(name)}


def onsets(model: nn.Module) -> dict[str, int]:
    """Lengths from which on the text configuration says that something else happens."""
    return {name: value for name, value in _named(model).items() if not _WINDOW.fullmatch(name)}


def refuse_what_reads_the_place(model: nn.Module) -> None:
    """Raise for switches that make a token's result depend on its place in the row, whatever documents the row holds.

    Raises:
        ContaminationError: `row_dependent`.
    """
    for config in _configs(model):
        if on := [name for name in _BY_PLACE if getattr(config, name, False) is True]:
            raise ContaminationError(
                f"{type(config).__name__} sets {', '.join(on)}: attention follows the place in the row, or its length",
                code="row_dependent",
                remedy=f"set {', '.join(f'config.{name} = False' for name in on)}, or train without packing",
            )


@contextmanager
def lowered(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Set every limit of these names that is out of reach to `LOWERED` inside, in configurations and in modules."""
    undo: list[tuple[MutableMapping[str, Any], str, Any]] = []
    wanted = set(names)
    if wanted & set(_GROWTH):
        wanted |= {*_GROWTH, "original_max_seq_len"}
    try:
        for holder in _holders(model):
            for name in wanted & holder.keys():
                if type(holder[name]) is int and holder[name] > AFFORDABLE:
                    undo.append((holder, name, holder[name]))
                    holder[name] = LOWERED
        yield
    finally:
        for holder, name, value in undo:
            holder[name] = value


def _named(model: nn.Module) -> dict[str, int]:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    rules = _rope_rules(config)
    kinds = {str(rule.get("rope_type", rule.get("type"))) for rule in rules}
    grows = any("dynamic" in kind for kind in kinds)
    # With other kinds (YaRN, Llama 3) the original length shapes the frequencies once for all.
    follows = grows or "longrope" in kinds or any(_TEMPERATURE in rule for rule in rules)
    found: dict[str, int] = {}
    for holder in (vars(config), *rules):
        for name, value in holder.items():
            known = bool(_WINDOW.fullmatch(name) or _ONSET.fullmatch(name))
            if (
                (known or (follows and name == _ORIGINAL) or (grows and name in _GROWTH))
                and type(value) is int
                and value > 0
            ):
                found[name] = value
    return found


def _rope_rules(config: Any) -> list[dict[str, Any]]:
    """The dictionaries that say how rotary frequencies are scaled, one for each kind of layer where there are several."""
    rules = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rules, dict):
        return []
    return [rules, *(value for value in rules.values() if isinstance(value, dict))]


def _configs(model: nn.Module) -> list[Any]:
    found = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None and hasattr(c, "__dict__")}
    return list(found.values())


def _holders(model: nn.Module) -> list[MutableMapping[str, Any]]:
    holders: list[MutableMapping[str, Any]] = [vars(module) for module in model.modules()]
    for config in _configs(model):
        holders += [vars(config), *_rope_rules(config)]
    return list({id(holder): holder for holder in holders}.values())
