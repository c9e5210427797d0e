"""A configuration made narrow: the same architecture and kinds of layers, with a few thousand weights.

Invariant: fields that say what the model computes (activations, biases, ALiBi, kinds of layers, position embeddings) keep
their values; only sizes change, dropout goes, and ids of special tokens move into the small vocabulary.

    hidden_size 4096, 32 layers (sliding, sliding, …, full)  →  hidden_size 32, 2 layers (sliding, full), sliding_window 7
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sft_plugins.preflight.tiny_model.sizes import (
    DERIVED,
    FITTING,
    HIDDEN,
    LAYER_COUNTS,
    SIZES,
    SPECIAL_TOKENS,
    STACK_SIZES,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

Layers = Literal["kinds", "all"] | int
"""`kinds`: the first of each kind where the configuration lists them, else two; `all`; or so many from the first on."""

# Says where a configuration comes from, not what it is; a twin is never quantised and runs no code of a repository.
_ORIGIN = {
    "_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id", "model_type", "quantization_config",
    "torch_dtype", "transformers_version",
}  # fmt: skip


def narrow(
    config: PretrainedConfig, *, changes: dict[str, Any] | None = None, layers: Layers = "kinds"
) -> PretrainedConfig:
    """`config`, narrow. `changes` are fields to set besides; dotted names reach into sub-configurations."""
    kind = type(config)
    return kind(**_fields(config, {**FITTING.get(config.model_type, {}), **(changes or {})}, layers))


def _fields(config: PretrainedConfig, changes: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """The fields that differ from those of a default configuration, sizes cut."""
    from transformers import PretrainedConfig

    fields, default = _own_fields(config), _default_fields(config)
    new: dict[str, Any] = {}
    for key, value in fields.items():
        inner = vars(config).get(key)
        if isinstance(inner, PretrainedConfig):
            prefix = key + "."
            inside = {k[len(prefix) :]: v for k, v in changes.items() if k.startswith(prefix)}
            new[key] = _fields(inner, {**FITTING.get(inner.model_type, {}), **inside}, layers)
        elif key in SIZES and isinstance(value, int | float) and not isinstance(value, bool):
            new[key] = min(SIZES[key], value)
        elif "drop" in key and isinstance(value, float):
            new[key] = 0.0
        elif key in SPECIAL_TOKENS and value is not None:
            new[key] = SPECIAL_TOKENS[key]
        elif key not in _ORIGIN and value != default.get(key):
            new[key] = value
    if "kv_lora_rank" in fields:  # multi-head latent attention: as many key heads as heads, and two kinds of head size
        new["num_key_value_heads"] = SIZES["num_attention_heads"]
        if fields.get("head_dim") == fields.get("qk_rope_head_dim"):
            new["head_dim"] = SIZES["qk_rope_head_dim"]
        elif "head_dim" in fields:
            new["head_dim"] = SIZES["qk_head_dim"]
    new |= _cut_layers(fields, layers)
    new |= {key: value for key, value in changes.items() if "." not in key}
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(new.get(key), dict):
            new[key] = _fitting_rope(new[key], new)
    return {key: value for key, value in new.items() if value is not DERIVED}


def _own_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Its fields, counts and lists as the object holds them: a file may count otherwise (dory's: two blocks to a layer)."""
    held = vars(config)
    return {k: held[k] if isinstance(held.get(k), int | list) else v for k, v in config.to_dict().items()}


def _default_fields(config: PretrainedConfig) -> dict[str, Any]:
    try:
        return _own_fields(type(config)())
    except (TypeError, ValueError):  # has no default: everything it holds is its own
        return {}


def _cut_layers(fields: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """Lists with one entry per layer, cut to the layers that stay, and the number of those."""
    count_key = next((key for key in LAYER_COUNTS if isinstance(fields.get(key), int)), None)
    if count_key is None:
        return {}
    count = fields[count_key]
    lists = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == count and len(v) > 2}
    lists = {k: v for k, v in lists.items() if v != list(range(len(v)))}
    shared = fields.get("num_kv_shared_layers") or 0  # the last so many read the keys and values of earlier ones
    if layers == "kinds":
        told = [*lists.values(), [i >= count - shared for i in range(count)]] if lists else []
        kinds = [tuple(map(repr, layer)) for layer in zip(*told, strict=True)]
        keep = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
        if not keep:
            return {}
        keep = keep if len(keep) > 1 else keep * 2
    else:
        keep = list(range(count if layers == "all" else min(layers, count)))
    new: dict[str, Any] = {k: [min(SIZES[k], v[i]) if k in SIZES else v[i] for i in keep] for k, v in lists.items()}
    if layers != "kinds":  # more than one count: an encoder's beside the decoder's
        new |= {key: min(fields[key], len(keep)) for key in STACK_SIZES if isinstance(fields.get(key), int)}
    if shared:
        new["num_kv_shared_layers"] = sum(i >= count - shared for i in keep)
    return {**new, count_key: len(keep)}


def _fitting_rope(rope: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters with one number per frequency, cut to the frequencies that a narrow head has."""
    head = new.get("qk_rope_head_dim") or new.get("head_dim") or HIDDEN // new.get("num_attention_heads", 4)
    fitted: dict[str, Any] = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            fitted[key] = _fitting_rope(value, new)
        elif key == "partial_rotary_factor" and isinstance(value, float) and int(head * value) % 2:
            fitted[key] = 0.5
        else:
            fitted[key] = value
    frequencies = int(head * fitted.get("partial_rotary_factor", new.get("partial_rotary_factor", 1.0)) or head) // 2
    for key in ("short_factor", "long_factor"):
        if isinstance(fitted.get(key), list):
            fitted[key] = fitted[key][:frequencies]
    if isinstance(fitted.get("mrope_section"), list) and sum(fitted["mrope_section"]) != frequencies:
        parts = len(fitted["mrope_section"])
        fitted["mrope_section"] = [frequencies - (parts - 1), *[1] * (parts - 1)]
    return fitted


def enlarge_weights(model: nn.Module) -> None:
    """Scale every matrix to unit gain and give every vector some noise, so that each logit depends on its whole context.

    A model's own initialisation (std .02 as a rule) leaves attention flat and residual branches silent: a leak would
    change the last digits only. Structured parameters (decays, time constants) keep their form.
    """
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.1 * torch.randn_like(parameter)
            elif (parameter.std() == 0 and parameter.mean() == 0) or parameter.mean().abs() < parameter.std():
                fan_in = parameter[0].numel() if parameter.dim() < 3 else parameter.shape[-1]
                parameter.copy_(torch.randn_like(parameter) * 1.2 / fan_in**0.5)
