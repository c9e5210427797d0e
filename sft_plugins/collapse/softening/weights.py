"""Full weights at any share λ of the way from the base to where training left them: θ0 + λ(θ − θ0), rounded once.

Computed in float64 and rounded to the type of the tuned weights: half a unit in the last place, whatever λ.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft_plugins.errors import CollapseError

__all__ = ["WeightsDial", "copy_beside", "interpolate", "logits_differ"]

# How far logits of two ways to compute the same may be apart, relative to the largest: what rounding W + λ·BA costs.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_HALF_TOLERANCE = 0.04
_NOT_COPIED = ("adapter_config.json", "trainer_state.json")


def interpolate(base: Tensor, tuned: Tensor, share: float) -> Tensor:
    """θ0 + λ(θ − θ0) in float64, rounded once to the type of `tuned`; the ends bit for bit."""
    if share in (0.0, 1.0):
        return (tuned if share else base).to(tuned.dtype)
    start = base.double()
    return (start + share * (tuned.double() - start)).to(tuned.dtype)


def logits_differ(one: Sequence[Tensor], other: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The largest difference, relative to the largest logit.

    Raises:
        CollapseError: `not_equal`, above what rounding in `dtype` explains.
    """
    pairs = list(zip(one, other, strict=True))
    error = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)
    limit = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    if not error <= limit:
        raise CollapseError(
            f"what was written, loaded again, gives logits that differ by {error:.2g} of the largest from those of the "
            f"weights (limit {limit:.2g} in {dtype})",
            code="not_equal",
            remedy="nothing was kept; please report this with the adapter's configuration",
        )
    return error


def copy_beside(source: Path, target: Path) -> None:
    """Tokenizer, template and the like: the small files of a model's folder that hold no weights and no state of a trainer."""
    for path in sorted(source.iterdir()):
        keep = path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.endswith(".index.json")
        if path.is_file() and keep and path.name not in _NOT_COPIED and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


class WeightsDial:
    """A fully tuned model at a share of the way from its base. Holds base, tuned weights and the model: three times its size.

    Raises:
        CollapseError: `wrong_base`, where the two do not have the same weights by name and shape.
    """

    def __init__(self, base: nn.Module, tuned: Any, folder: Path) -> None:
        self.model, self.folder = tuned, folder
        self._base = {name: value.detach() for name, value in base.state_dict().items()}
        self._tuned = {name: value.detach().clone() for name, value in tuned.state_dict().items()}
        shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (self._base, self._tuned)]
        differing = sorted(
            name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
        )
        if differing:
            name = differing[0]
            raise CollapseError(
                f"{name} is {shapes[1].get(name) or 'missing'} in {folder} and {shapes[0].get(name) or 'missing'} in the base",
                code="wrong_base",
                remedy="give the model that training started from as --base; where tokens were added, its rows have no base",
            )
        self.model.eval()

    def turn(self, share: float) -> None:
        """Set the model to `share` of the way: 1 is as trained, 0 the base."""
        state = self.model.state_dict()
        with torch.no_grad():
            for name, value in self._tuned.items():
                if value.is_floating_point():
                    state[name].copy_(interpolate(self._base[name], value, share))

    def write(self, share: float, folder: Path) -> None:
        """The weights at `share` as a model's folder."""
        self.turn(share)
        self.model.save_pretrained(folder)
        copy_beside(self.folder, folder)

    def check(self, share: float, folder: Path, rows: Sequence[Sequence[int]]) -> dict[str, float]:  # noqa: ARG002
        """Load `folder` anew: every weight must be, bit for bit, what `turn` computes.

        Raises:
            CollapseError: `not_equal`.
        """
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
        for name, value in self._tuned.items():
            expected = interpolate(self._base[name], value, share) if value.is_floating_point() else value
            if name not in loaded or not torch.equal(loaded[name].to(expected.device), expected):
                raise CollapseError(
                    f"{name}, loaded again from what was written, is not θ0 + λ(θ − θ0)",
                    code="not_equal",
                    remedy="nothing was kept; please report this with the model's name",
                )
        return {"weights_error": 0.0}
