"""A LoRA adapter at any share λ of its own strength: in memory, on disk, and proof that both are W + λ·BA.

    adapter_config.json   lora_alpha 16, alpha_pattern {"v_proj": 32}   at λ = 3/4 →   12, {"v_proj": 24}
    adapter_model         copied byte for byte

The scale of a LoRA layer is alpha ÷ rank (÷ √rank with rsLoRA), so λ goes into alpha, where it costs nothing: λ·alpha is exact
for quarters, and for any other λ wrong by 1 part in 10¹⁶. Scaling B instead would round every weight (1 part in 500 in
bfloat16) unless λ is a power of two. Copies of whole modules (`modules_to_save`) become θ0 + λ(θ − θ0).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft_plugins._preserve import untouched
from sft_plugins.collapse.softening.weights import copy_beside, interpolate, logits_differ
from sft_plugins.errors import CollapseError

__all__ = ["AdapterDial", "read_config"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Options under which an adapter is W + scale·BA on a base that is left as it is, whatever their value.
_LINEAR = frozenset((
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "fan_in_fan_out", "use_rslora", "modules_to_save", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_core", "target_parameters", "ensure_weight_tying",
    "qalora_group_size", "runtime_config", "eva_config", "init_lora_weights", "bias",
))  # fmt: skip
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base's weights alone."""
_NAME = "default"


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, if λ·BA is all there is to it.

    Raises:
        CollapseError: `adapter_file`, `not_lora`, `lora_variant` (naming the option).
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise CollapseError(
            f"{path} cannot be read: {error}", code="adapter_file", remedy="save the adapter again with save_pretrained"
        ) from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CollapseError(
            f"{folder} holds an adapter of type {kind}, expected LORA",
            code="not_lora",
            remedy="only LoRA adds λ·BA to weights; train with LoRA, or merge the adapter and give --base",
        )
    for name, value in sorted(config.items()):
        if name == "bias" and value != "none":
            _refuse(name, value, "biases are trained beside the adapter")
        if name == "init_lora_weights" and value not in _INITIAL:
            _refuse(name, value, "the base is changed where such an adapter begins")
        if name not in _LINEAR and value and value != _default(name):
            _refuse(name, value, "the adapter is not λ·BA then")
    return config


class AdapterDial:
    """A PEFT model with its adapter at a share of its strength.

    Args:
        base: the model that the adapter was trained on.
        folder: of the adapter.

    Raises:
        CollapseError: as `read_config`; `adapter_file` where the weights cannot be read, `wrong_base` where they do not fit.
    """

    def __init__(self, base: nn.Module, folder: Path) -> None:
        from peft import PeftModel
        from peft.utils.save_and_load import load_peft_weights

        self.folder, self.config = folder, read_config(folder)
        names = [path.name for path in folder.iterdir() if path.name.startswith("adapter_model")]
        whole = [name for name in names if name in (WEIGHTS, "adapter_model.bin")]
        if len(whole) != 1:
            raise CollapseError(
                f"{folder} holds {', '.join(sorted(names)) or 'no weights'}; expected one {WEIGHTS}",
                code="adapter_file",
                remedy="save the adapter in one file: merge its shards, or save it again with save_pretrained",
            )
        self._file = whole[0]
        try:
            self.tensors: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
        except Exception as error:  # cut short, or no such file at all: safetensors and torch have errors of their own
            raise CollapseError(
                f"{folder / self._file} cannot be read: {type(error).__name__}: {error}",
                code="adapter_file",
                remedy="the file was cut short, or is of another kind; take another checkpoint",
            ) from error
        same = _as_in_base(base, self.tensors)  # before PEFT loads them into it
        try:
            self.model: Any = PeftModel.from_pretrained(base, str(folder), adapter_name=_NAME)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CollapseError(
                f"the adapter of {folder} does not fit {type(base).__name__}: {str(error)[:300]}",
                code="wrong_base",
                remedy="give the model that it was trained on as --base",
            ) from error
        self.model.eval()
        self._layers = dict(_layers(self.model))
        self._scales = {name: float(layer.scaling[_NAME]) for name, layer in self._layers.items()}
        self._saved = dict(_saved_modules(self.model))
        known = {key for key in self.tensors if ".lora_" in key} | self._saved.keys()
        if other := sorted(self.tensors.keys() - known - same):
            raise CollapseError(
                f"{folder / self._file} holds weights beside the adapter's, {other[0]} for one",
                code="lora_variant",
                remedy="only LoRA layers and modules_to_save have a way back to the base; train without the others",
            )

    def turn(self, share: float) -> None:
        """Set the model to `share` of the adapter: 1 is as trained, 0 the base."""
        for name, layer in self._layers.items():
            layer.scaling[_NAME] = share * self._scales[name]
        for tuned, base, trained in self._saved.values():
            tuned.data.copy_(interpolate(base.data, trained.to(base.device), share))

    def write(self, share: float, folder: Path) -> None:
        """The adapter at `share` as a PEFT folder, with whatever else lay beside it but the trainer's own files."""
        folder.mkdir(parents=True)
        config = {**self.config, "lora_alpha": _scaled(self.config["lora_alpha"], share)}
        config["alpha_pattern"] = {k: _scaled(v, share) for k, v in (self.config.get("alpha_pattern") or {}).items()}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        copy_beside(self.folder, folder)
        if not self._saved:
            shutil.copyfile(self.folder / self._file, folder / self._file)
            return
        from safetensors.torch import save_file

        written = dict(self.tensors)
        for key, (_, base, trained) in self._saved.items():
            if key in written:
                written[key] = interpolate(base.detach().cpu(), trained, share).contiguous()
        save_file(written, str(folder / WEIGHTS), metadata={"format": "pt"})

    def check(self, share: float, folder: Path, rows: Sequence[Sequence[int]]) -> dict[str, float]:
        """Load `folder` anew beside the adapter and hold it against the weights W + λ·BA, merged. The model is spent then.

        Returns: the largest error of a layer's scale, and of the logits after `rows` relative to their largest.

        Raises:
            CollapseError: `not_equal`.
        """
        model = self.model
        model.load_adapter(str(folder), adapter_name="softened")
        scale = 0.0
        for name, layer in self._layers.items():
            expected = share * self._scales[name]
            scale = max(scale, abs(layer.scaling["softened"] - expected) / max(abs(expected), 1e-300))
        model.set_adapter("softened")
        with untouched(model):
            loaded = [_logits(model, row) for row in rows]
            model.set_adapter(_NAME)
            self.turn(share)
            for layer in self._layers.values():
                _untie(layer)
                layer.merge(safe_merge=False, adapter_names=[_NAME])
            merged = [_logits(model, row) for row in rows]
        return {"scale_error": scale, "logits_error": logits_differ(loaded, merged, next(model.parameters()).dtype)}


def _refuse(name: str, value: Any, why: str) -> None:
    raise CollapseError(
        f"the adapter was trained with {name}={value!r}: {why}",
        code="lora_variant",
        remedy="merge it into the base with PEFT and soften the full weights, with the base as --base",
    )


def _default(name: str) -> Any:
    from peft import LoraConfig

    return getattr(LoraConfig(), name, None)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that PEFT put in, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and _NAME in getattr(module, "scaling", ()):
            yield name, module


def _scaled(alpha: float, share: float) -> float:
    value = share * alpha
    return int(value) if value == int(value) else value  # readers that expect a whole number get one where there is one


def _saved_modules(model: nn.Module) -> Mapping[str, tuple[nn.Parameter, nn.Parameter, Tensor]]:
    """By name in the adapter's file, of all that `modules_to_save` copies: the copy, the base's own, the copy as trained."""
    found = {}
    for name, module in model.named_modules():
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and _NAME in copies:
            for part, base in module.original_module.named_parameters():
                tuned = copies[_NAME].get_parameter(part)
                found[f"{name}.{part}"] = (tuned, base, tuned.detach().cpu().clone())
    return found


def _as_in_base(base: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of weights that PEFT saves along (embeddings of a target) and that training has left as they were."""
    own = dict(base.named_parameters(remove_duplicate=False))
    same = set()
    for key, value in tensors.items():
        weight = own.get(key.removeprefix("base_model.model.").replace(".base_layer", ""))
        if (
            weight is not None
            and weight.shape == value.shape
            and torch.equal(weight.detach().cpu(), value.to(weight.dtype))
        ):
            same.add(key)
    return same


def _untie(layer: Any) -> None:
    """Merging writes into the base's weight; where another module shares it, that one must keep what it has."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if isinstance(weight, nn.Parameter):
        layer.get_base_layer().weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def _logits(model: nn.Module, row: Sequence[int]) -> Tensor:
    ids = torch.tensor([list(row)], device=next(model.parameters()).device)
    return model(input_ids=ids, use_cache=False).logits.float().cpu()
