"""A model's twin: the same architecture and kinds of layers in the same order, but few, narrow and with random weights.

Whether documents of a packed row see one another is decided by a model's code and its kinds of layers, not by how wide it
is or what it has learned, so the twin of a model of any size answers for it in seconds, without its weights.

Invariant: every kind of layer that the model has, the twin has; kinds are told apart by what the modules are (classes,
switches, windows), not by what the configuration says of them.

    >>> made = twin(AutoConfig.from_pretrained("google/gemma-2-9b"))
    >>> str(made)
    'Gemma2ForCausalLM, 2 of 42 layers, hidden size 32 of 3584, vocabulary 96 of 256,000, windows and chunks of 7 tokens'
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_plugins.errors import AssetError
from sft_plugins.preflight.tiny_model.narrow import Layers, enlarge_weights, narrow

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Twin:
    """A narrow model in evaluation mode, and what was cut: `field: (twin's, original's)`."""

    model: PreTrainedModel
    cut: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        words = {
            "num_hidden_layers": "{} of {} layers",
            "hidden_size": "hidden size {} of {}",
            "vocab_size": "vocabulary {} of {:,}",
        }
        parts = [words[name].format(*sizes) for name, sizes in self.cut.items() if name in words]
        windows = sorted({now for name, (now, _) in self.cut.items() if name not in words})
        parts += [f"windows and chunks of {', '.join(map(str, windows))} tokens"] if windows else []
        return ", ".join([type(self.model).__name__, *parts])


def twin(config: PretrainedConfig, *, dtype: torch.dtype | None = None, attn: str | None = None, seed: int = 0) -> Twin:
    """The twin of the causal language model that `config` describes, on the CPU, its weights a function of `seed`.

    Args:
        dtype: of its weights; float32 if left out.
        attn: its attention implementation; transformers chooses if left out.

    Raises:
        AssetError: `no_twin` for an architecture that cannot be built narrow, or is no causal language model;
            `bad_option` for an attention implementation that it does not have here.
    """
    import torch

    dtype = dtype or torch.float32
    try:
        deep = _build(config, "all", torch.float32, None, seed)
    except Exception as error:  # whatever a model's constructor raises
        raise AssetError(
            f"no narrow twin of a {config.model_type} model can be built: {_first_line(error)}",
            code="no_twin",
            remedy="use --weights, which checks the model itself; if it is no causal language model, it cannot be packed.",
        ) from error
    try:
        model = _build(config, _fewest_layers(config, deep, seed), dtype, attn, seed)
    except Exception as error:  # a package that is missing, a kernel that the hub does not give, a plain refusal
        raise AssetError(
            f"--attn {attn}: {type(deep).__name__} cannot be built with it here: {_first_line(error)}",
            code="bad_option",
            remedy="leave --attn out for the model's default, or install what it needs.",
        ) from error
    return Twin(model, _what_was_cut(model.config.get_text_config(), config.get_text_config()))


def layer_kinds(model: nn.Module) -> list[Hashable]:
    """One value per decoder layer, alike for layers of one kind: the classes of its modules, their switches and windows.

    Empty for a model that keeps its layers in no list.
    """
    from torch import nn

    count = _layer_count(model.config.get_text_config())
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return [_kind(layer) for layer in stacks[0]] if stacks else []


def _kind(layer: nn.Module) -> Hashable:
    # Numbers in names count experts and adapters, which differ in number from layer to layer, not in kind.
    return frozenset(
        (
            re.sub(r"\d+", "#", name),
            type(module).__name__,
            tuple((k, str(v)) for k, v in vars(module).items() if _tells(k, v)),
        )
        for name, module in layer.named_modules()
    )


def _tells(name: str, value: Any) -> bool:
    """Whether an attribute tells kinds apart: switches and names do, counters of layers and sizes do not."""
    if name.startswith("_") or name == "training":  # torch's own
        return False
    if isinstance(value, str):
        return not any(character.isdigit() for character in value)
    return isinstance(value, bool) or value is None or "window" in name or ("chunk" in name and isinstance(value, int))


def _fewest_layers(config: PretrainedConfig, deep: nn.Module, seed: int) -> Layers:
    """The shortest cut that still has every kind of layer: the first of each listed kind, else the first few layers.

    Where the model keeps its layers in no list, the configuration's word is taken.
    """
    import torch

    kinds = layer_kinds(deep)
    places = [[i for i, kind in enumerate(kinds) if kind == one] for one in set(kinds)]
    once, twice = (max((where[:times][-1] for where in places), default=0) + 1 for times in (1, 2))
    # Twice: layers that share weights come as two at least.
    choices: tuple[Layers, ...] = ("kinds", max(2, once), max(2, twice))
    for layers in choices:
        try:
            if set(layer_kinds(_build(config, layers, torch.float32, None, seed))) == set(kinds):
                return layers
        except Exception:  # a cut that does not fit together; the next may
            continue
    return "all"


def _build(
    config: PretrainedConfig, layers: Layers, dtype: torch.dtype, attn: str | None, seed: int
) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    options = {} if attn is None else {"attn_implementation": attn}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(narrow(config, layers=layers), dtype=dtype, **options)
        enlarge_weights(model)
    return model.eval()


def _layer_count(text: PretrainedConfig) -> int:
    return int(getattr(text, "num_hidden_layers", 0) or 0)


def _what_was_cut(now: PretrainedConfig, before: PretrainedConfig) -> dict[str, tuple[int, int]]:
    names = ("num_hidden_layers", "hidden_size", "vocab_size", "sliding_window", "attention_chunk_size")
    sizes = {name: (getattr(now, name, None), getattr(before, name, None)) for name in names}
    return {k: (a, b) for k, (a, b) in sizes.items() if isinstance(a, int) and isinstance(b, int) and a != b}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
