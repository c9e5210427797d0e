"""The `varlen` backend: block-diagonal attention through transformers' attention and mask interfaces.

Invariant: outside a packed forward the model's config names its own implementation, so nothing here is reached; inside
one, every attention call that goes through the interface sees single documents only, under the layer's own rule.

While a packed forward (or its recompute) runs, the configs of its modules name `sft_plugins_varlen` on its thread.
transformers then asks `block_diagonal_mask` for the masks, one per kind of layer. It answers with a one-element ticket
that names the layer's rule, and `block_diagonal_attention` reads the rule off the ticket that reaches it. A ticket holds
NaN: model code that uses it as a mask by itself fails loudly.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.backends.kernels import Attend, Rule, per_document, varlen, varlen_supports
from sft_plugins.packing.isolation.backends.naming import named_here
from sft_plugins.packing.isolation.backends.temperature import of_the_document
from sft_plugins.packing.isolation.boundaries import Boundaries
from sft_plugins.packing.isolation.frame import Call, Switch, current_boundaries, recompute_leaves

IMPLEMENTATION = "sft_plugins_varlen"

# Arguments that a plain attention kernel does not have: with these the model's own code runs, document by document.
_OWN_CODE = ("softcap", "s_aux", "sinks", "head_mask")
# Arguments that speak of pairs of tokens, which cannot be cut into documents without knowing their layout.
_REFUSED = ("position_bias", "alibi", "indices", "block_indices", "cache", "block_mask")


class Varlen:
    """Documents stay in one row; only attention, through transformers' interfaces, tells them apart.

    Args:
        keep_keys: pass the boundary keys on, for hybrid models whose linear-attention kernels read them.
    """

    name = "varlen"
    trees = False

    def __init__(self, *, keep_keys: bool = False) -> None:
        self.keep_keys = keep_keys

    def open(self, module: nn.Module, boundaries: Boundaries) -> Switch:
        """The configs of `module` name our attention while its layers run."""
        AttentionInterface.register(IMPLEMENTATION, block_diagonal_attention)
        AttentionMaskInterface.register(IMPLEMENTATION, block_diagonal_mask)
        configs = list({id(c): c for c in (getattr(m, "config", None) for m in module.modules()) if _names(c)}.values())
        boundaries.scratch["own"] = _own_code(module)
        return functools.partial(named_here, configs, IMPLEMENTATION)

    def run(self, call: Call, arguments: dict[str, Any], boundaries: Boundaries) -> Any:  # noqa: ARG002
        """The packed row goes through the backbone as it is."""
        return call(**arguments)


def _names(config: Any) -> bool:
    return hasattr(type(config), "_attn_implementation")


def _own_code(module: nn.Module) -> str:
    """Which of transformers' attentions must serve documents where no packed kernel computes the same.

    What a document gets alone is what it must get here, quirks included: `sdpa` drops soft caps in transformers 5.16.
    """
    implementation = str(module.config._attn_implementation)
    if implementation == "eager" and getattr(module, "_supports_sdpa", False):
        return "flexible"
    return implementation if implementation in ("eager", "sdpa") else "flexible"


@torch.compiler.disable
def block_diagonal_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> torch.Tensor:
    """The ticket [1, 1, 1, 1] for a layer's rule, in place of a mask; arguments as in `transformers.masking_utils`."""
    boundaries = _boundaries()
    # Some models make an all-ones mask of their own where none is given; it hides nothing.
    hides = attention_mask is not None and not bool(attention_mask.all())
    if use_vmap or hides or mask_function is None or q_length != kv_length:
        raise _unsupported("the model overlays its causal mask with one of its own")
    rule = _rule_of(mask_function, local_size, boundaries, device, config)
    ticket = torch.full((1, 1, 1, 1), float("nan"), dtype=dtype, device=device)
    boundaries.scratch.setdefault("tickets", {})[ticket.data_ptr()] = (rule, ticket)
    return ticket


def _rule_of(
    mask_function: Callable[..., torch.Tensor],
    local_size: int | None,
    boundaries: Boundaries,
    device: torch.device | str,
    config: Any,
) -> Rule:
    """What `mask_function(batch, head, query, key)` allows inside a document, found by asking it about pairs."""

    def seen(where: np.ndarray, back: int) -> torch.Tensor:
        """Whether each of the packed positions `where` sees the one `back` before it."""
        row, query = np.divmod(np.flatnonzero(where), boundaries.tokens // boundaries.rows)
        batch, q, kv = (torch.from_numpy(index).to(device) for index in (row, query, query - back))
        return mask_function(batch, 0, q, kv)

    longest = boundaries.max_length
    index = np.arange(boundaries.tokens) - np.repeat(boundaries.starts, boundaries.lengths)
    if longest > 1 and bool(seen(np.append(index[1:] > 0, False), -1).any()):
        raise _unsupported("some tokens see later ones")
    if local_size is None or local_size >= longest:
        return Rule()
    if bool(seen(index == local_size, local_size).any()):
        raise _unsupported(f"a layer with a local size of {local_size} sees further back")
    if boundaries.lengths.max() <= local_size:
        return _named_rule(local_size, config)
    # In a sliding window every token sees the one before it; the first token of a chunk does not. Chunks may be counted
    # from the start of the row (transformers 5.16), so it can be any token; run alone, they count as `Rule` does.
    sliding = local_size == 1 or bool(seen(index > 0, 1).all())
    return Rule(window=local_size) if sliding else Rule(chunk=local_size)


def _named_rule(local_size: int, config: Any) -> Rule:
    """What the configuration calls a local size. Of trees whose branches are all shorter, no pair of tokens shows it."""
    is_chunk = getattr(config, "attention_chunk_size", None) == local_size
    if is_chunk and getattr(config, "sliding_window", None) == local_size:
        raise _unsupported(f"{local_size} is the size of chunks and of a sliding window")
    return Rule(chunk=local_size) if is_chunk else Rule(window=local_size)


@torch.compiler.disable
def block_diagonal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each document to itself alone; arguments as in transformers' attention interface.

    Naive equivalent: the model's own attention, run on each document, concatenated.

    Args:
        query: [B, H, T, D]; key: [B, Hk, T, D]; value: [B, Hk, T, Dv].
        attention_mask: a ticket from `block_diagonal_mask`, or None.

    Returns:
        ([B, T, H, Dv], None).

    Raises:
        ContaminationError: `unsupported_attention`, where it cannot be cut into documents without guessing;
            `recomputed_outside`, where its recompute could not be followed.
    """
    boundaries = _boundaries()
    if recompute_leaves():
        raise ContaminationError(
            f"a layer around {type(module).__name__} is checkpointed in a way that would be recomputed outside its packed "
            "forward, where its documents are not known",
            code="recomputed_outside",
            remedy="checkpoint layers with model.gradient_checkpointing_enable(), torch's checkpoint_wrapper or "
            "functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False), or isolate(model, "
            "backend='unpack')",
        )
    rule = _rule_from(attention_mask, module, kwargs, boundaries)
    if refused := [name for name in _REFUSED if kwargs.get(name) is not None]:
        raise _unsupported(f"{type(module).__name__} passes {', '.join(refused)}")
    if query.shape[0] * query.shape[2] != boundaries.tokens or key.shape[2] != query.shape[2]:
        raise _unsupported(
            f"{type(module).__name__} attends from {list(query.shape)} to {list(key.shape)}, "
            f"not within the {boundaries.tokens} tokens of the packed row"
        )
    query = of_the_document(module, query, boundaries)
    special = {name: kwargs[name] for name in _OWN_CODE if kwargs.get(name) is not None}
    own = boundaries.scratch["own"]
    attend: Attend
    if own == "eager" or (special and own != "sdpa"):
        attend = _eager_of(module, rule, dropout=dropout, scaling=scaling, **special)
    else:
        query, key, value = _as_autocast(query, key, value)
        if not special and varlen_supports(
            query, key, value, rule=rule, longest=boundaries.max_length, dropout=dropout
        ):
            return varlen(query, key, value, boundaries=boundaries, rule=rule, scale=scaling), None
        attend = functools.partial(_sdpa_of, module, rule, dropout=dropout, scaling=scaling, **special)
    return per_document(query, key, value, boundaries=boundaries, attend=attend), None


def _rule_from(mask: torch.Tensor | None, module: nn.Module, kwargs: dict[str, Any], boundaries: Boundaries) -> Rule:
    if mask is None:
        is_causal = kwargs.get("is_causal")
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise _unsupported(f"{type(module).__name__} is not causal")
        return Rule(window=kwargs.get("sliding_window"))
    # Slicing and expanding keep the storage, which is what a ticket is known by.
    found = boundaries.scratch.get("tickets", {}).get(mask.untyped_storage().data_ptr())
    if found is None:
        raise _unsupported(f"{type(module).__name__} is given a mask of its own, {list(mask.shape)}")
    return found[0]


def _eager_of(module: nn.Module, rule: Rule, **arguments: Any) -> Attend:
    """The eager attention of the file that defines the layer, on whole documents with their causal mask."""
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return functools.partial(_eager, eager, module, rule, arguments)
    raise _unsupported(f"{type(module).__name__} has no eager attention to run document by document")


def _eager(
    eager: Call,
    module: nn.Module,
    rule: Rule,
    arguments: dict[str, Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    seen = rule.mask(query.shape[2], key.shape[2], query.device)
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill_(~seen, torch.finfo(query.dtype).min)[None, None]
    return eager(module, query, key, value, mask, **arguments)[0]


def _sdpa_of(
    module: nn.Module, rule: Rule, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any
) -> torch.Tensor:
    """transformers' own use of `scaled_dot_product_attention`, on whole documents or on branches and what they see."""
    length, sees = query.shape[2], key.shape[2]
    plain = length == sees and rule.sees_all(length)
    mask = None if plain else rule.mask(length, sees, query.device)[None, None]
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attention(module, query, key, value, mask, is_causal=mask is None, **arguments)[0]


def _as_autocast(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Autocast knows `scaled_dot_product_attention`, but no custom kernel: cast as it would."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return states
    return tuple(state.to(torch.get_autocast_dtype(device)) for state in states)


def _boundaries() -> Boundaries:
    boundaries = current_boundaries()
    if boundaries is None:
        raise _unsupported("block-diagonal attention was reached outside a packed forward")
    return boundaries


def _unsupported(what: str) -> ContaminationError:
    return ContaminationError(what, code="unsupported_attention", remedy="isolate(model, backend='unpack')")
