"""The universal backend: the decoder runs on the documents as a right-padded batch, and what it says is packed again.

Invariant: for every document, the decoder is asked exactly what it is asked when the document runs alone, but for
padding after its end, which a causal model cannot see. Attention, convolutions, scans and delta rules need no knowledge
of packing, so every architecture is served. Head and loss go on seeing one packed row.

    row  a a b b b c  →  decoder  [a a ·]  →  packed  a a b b b c
                                  [b b b]
                                  [c · ·]

What it costs. Documents run in buckets, longest first; a bucket takes documents while three quarters of its slots are
tokens, so that at most 4/3 of the row's tokens are computed, in a handful of calls (log_{4/3}(longest) + 1 at the very
most). Where weights are sharded all documents share one call: each call gathers them from all ranks, which must make
equally many. A decoder that takes no attention mask, or pads wrongly, runs on documents of equal length together, without
padding: one call for each length, which plain data parallelism bears and sharded weights do not, so those are refused.

What it does not change. Routing of experts is per token, hence exact; router logits of padding are dropped before the
head sees them, so the auxiliary loss is that of the packed row (a decoder that computes one inside counts padding).
`use_cache` is off while packed rows run. A forward without boundaries is the decoder's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from sft_plugins._models import is_sharded
from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.backends.rotary import PADDED
from sft_plugins.packing.isolation.boundaries import Boundaries
from sft_plugins.packing.isolation.frame import Switch
from sft_plugins.packing.isolation.trees import Trees

_LENGTH_MATTERS = ("reformer",)
"""Models whose attention to a document depends on how much padding follows it: locality-sensitive hashing sorts tokens
into chunks, of which there are as many as the padded length fills."""


_FILL = 0.75
"""Least part of a bucket's slots that are tokens: less computes more padding, more calls the decoder more often."""


class Unpack:
    """Backend that runs the backbone on separate documents (see `forward.Backend`).

    Naive equivalent: `torch.cat([backbone(document) for document in documents], dim=1)`.

    Args:
        padding: False runs documents of equal length together and nothing else: more calls, for the few architectures
            whose own padding mask is wrong.
    """

    name = "unpack"
    keep_keys = False
    trees = False

    def __init__(self, *, padding: bool = True) -> None:
        self.padding = padding

    def open(self, module: nn.Module, boundaries: Boundaries) -> Switch:  # noqa: ARG002
        """No layer needs to know of documents: each sees an ordinary padded batch."""
        return nullcontext

    def run(self, call: Callable[..., Any], arguments: dict[str, Any], boundaries: Boundaries) -> Any:
        """Call the backbone on the documents of each bucket, and pack what it returns.

        Args:
            call: the backbone's forward.
            arguments: its arguments by name; tensors [rows, T/rows, …] are cut into documents.
            boundaries: the documents of the packed row or rows.

        Returns:
            The backbone's own type of output, its tensors [rows, T/rows, …]. Values that are not per token (a pooled
            state, a memory, a cache) become None.

        Raises:
            ContaminationError: `output_attentions`, if attention weights are asked for; `sharded`, if the weights are and
                documents cannot be padded.
        """
        if isinstance(boundaries, Trees):
            return _by_path(call, arguments, boundaries, padding=self.padding)
        return _by_document(call, arguments, boundaries, padding=self.padding)


def _by_path(call: Callable[..., Any], arguments: dict[str, Any], trees: Trees, *, padding: bool) -> Any:
    """Every path runs as a document of its own, and of what comes out each branch keeps its own tokens."""
    inputs = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
    seen, own = trees.seen(inputs.device), trees.own(inputs.device)
    paths = Boundaries(trees.path_lengths)
    laid = {name: _taken(value, seen, trees.tokens) for name, value in arguments.items()}
    return _taken(_by_document(call, laid, paths, padding=padding), own, paths.tokens)


def _taken(value: Any, index: torch.Tensor, tokens: int) -> Any:
    """`value` with its `tokens`, an axis of every tensor that has one per token, chosen and ordered by `index`."""
    if isinstance(value, Mapping):
        items = {key: _taken(item, index, tokens) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, tuple | list):
        return type(value)(_taken(item, index, tokens) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.ndim == 2 and value.shape[0] == tokens:
        return value[index]  # flat: router logits
    axis = next((axis for axis in (1, 2) if value.ndim > axis and value.shape[axis] == tokens), None)
    return value if axis is None else value.index_select(axis, index)


def _by_document(call: Callable[..., Any], arguments: dict[str, Any], boundaries: Boundaries, *, padding: bool) -> Any:
    if arguments.get("output_attentions"):
        raise ContaminationError(
            "attention weights [documents, heads, length, length] have no packed form",
            code="output_attentions",
            remedy="leave output_attentions off for packed rows",
        )
    inputs = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
    arguments = {name: value for name, value in arguments.items() if name != "attention_mask"}
    if _starts_at_zero(arguments.get("position_ids")):
        # The padded batch says as much, and every architecture numbers it as it numbers a document alone: from 0, from
        # the padding index on (roberta), or by the mask (opt).
        del arguments["position_ids"]

    decoder = getattr(call, "__self__", None)
    padding = padding and "attention_mask" in inspect.signature(call).parameters
    padding = padding and getattr(getattr(decoder, "config", None), "model_type", None) not in _LENGTH_MATTERS
    sharded = _gathers_weights(decoder)
    if sharded and not padding:
        raise ContaminationError(
            f"{type(decoder).__name__} runs on documents of one length at a time, and its weights are sharded: every call "
            "gathers them from all ranks, so ranks with other lengths would wait for each other for ever",
            code="sharded",
            remedy="train it with whole weights on every rank (DDP; DeepSpeed stage 1 or 2), or without packing",
        )
    buckets = [np.arange(boundaries.lengths.size)] if sharded else _buckets(boundaries.lengths, padding=padding)
    outputs = []
    for bucket in buckets:
        lengths = boundaries.lengths[bucket]
        boundaries.scratch.setdefault(PADDED, {})[int(lengths.max())] = lengths
        gather, is_token = _padded(boundaries.starts[bucket], lengths, inputs.device)
        batch = {name: _cut(value, gather, boundaries) for name, value in arguments.items()}
        if lengths.min() < lengths.max():
            batch["attention_mask"] = is_token.long()
        outputs.append((call(**batch), is_token))

    # Documents come back bucket by bucket; the row has them in their own order.
    order = np.concatenate(buckets)
    first = np.empty(order.size, dtype=np.int64)
    first[order] = np.cumsum(boundaries.lengths[order]) - boundaries.lengths[order]
    shift = np.repeat(first - boundaries.starts, boundaries.lengths)
    source = torch.from_numpy(np.arange(boundaries.tokens) + shift).to(inputs.device)
    return _pack(outputs, source, boundaries.rows)


def _starts_at_zero(position_ids: torch.Tensor | None) -> bool:
    return position_ids is not None and position_ids.ndim == 2 and bool(position_ids[0, 0] == 0)


def _buckets(lengths: np.ndarray, *, padding: bool) -> list[np.ndarray]:
    """Indices of the documents that run together, longest first.

    lengths 9, 2, 8, 1, 1 → [0, 2], [1, 3], [4]: 17 of 18 slots are tokens, 3 of 4, 1 of 1
    (with document 1 the first bucket would have 19 of 27, with document 4 the second 4 of 6)
    """
    buckets: list[list[int]] = []
    longest = tokens = 0
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        fits = tokens + length >= _FILL * (len(buckets[-1]) + 1) * longest if buckets and padding else length == longest
        if fits:
            buckets[-1].append(int(index))
            tokens += length
        else:
            buckets.append([int(index)])
            longest = tokens = length
    return [np.asarray(bucket) for bucket in buckets]


def _gathers_weights(decoder: nn.Module | None) -> bool:
    """Whether a call of the decoder waits for other ranks. Of a forward that hides its module nothing is known but that
    there are ranks."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    return decoder is None or is_sharded(decoder)


def _padded(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed position of every slot of the padded batch (padding repeats the last token), and which slots are tokens.

    starts 0, 2 and lengths 2, 3 → [[0, 1, 1], [2, 3, 4]] and [[1, 1, 0], [1, 1, 1]]
    """
    slots = np.arange(lengths.max())
    gather = starts[:, None] + np.minimum(slots, lengths[:, None] - 1)
    return torch.from_numpy(gather).to(device), torch.from_numpy(slots < lengths[:, None]).to(device)


def _cut(value: Any, gather: torch.Tensor, boundaries: Boundaries) -> Any:
    """Documents [n, l, …] out of an input [rows, T/rows, …]; position ids may have axes before the rows."""
    if isinstance(value, tuple | list):
        return type(value)(_cut(item, gather, boundaries) for item in value)
    shape = (boundaries.rows, boundaries.tokens // boundaries.rows)
    if isinstance(value, torch.Tensor) and value.shape[:2] == shape:
        return value.flatten(0, 1)[gather]
    if isinstance(value, torch.Tensor) and value.shape[1:] == shape:
        return value.flatten(1, 2)[:, gather]
    return value


def _pack(outputs: list[tuple[Any, torch.Tensor]], source: torch.Tensor, rows: int) -> Any:
    """One packed output from the outputs of the buckets, which differ in nothing but their shapes."""
    one = outputs[0][0]
    if isinstance(one, Mapping):
        items = {key: _pack([(output[key], m) for output, m in outputs], source, rows) for key in one}
        return type(one)(**items)
    if isinstance(one, tuple | list):
        return type(one)(_pack([(output[i], m) for output, m in outputs], source, rows) for i in range(len(one)))
    if not isinstance(one, torch.Tensor):
        return None
    flat = _are_flat(outputs)
    parts = [_tokens(output, is_token, flat=flat) for output, is_token in outputs]
    if any(part is None for part in parts):
        return None
    packed = torch.cat([part for part in parts if part is not None], dim=1)[:, source]  # [streams, T, …]
    if flat:
        return packed[0]
    packed = packed.unflatten(1, (rows, -1)).transpose(0, 1)  # [rows, streams, T/rows, …]
    return packed.flatten(1, 2)


def _tokens(output: torch.Tensor, is_token: torch.Tensor, *, flat: bool) -> torch.Tensor | None:
    """The tokens of one bucket, [streams, tokens, …]; None if `output` holds no value per token.

    Hidden states are [n, l, …]. Router logits are flat, [n·l, experts]. A decoder that predicts several tokens ahead
    (prophetnet) lays its streams side by side, [n, streams·l, …].
    """
    if flat:
        return output[is_token.flatten()][None]
    documents, length = is_token.shape
    if output.ndim < 2 or output.shape[0] != documents or output.shape[1] == 0 or output.shape[1] % length:
        return None
    return output.unflatten(1, (-1, length)).transpose(0, 1)[:, is_token]


def _are_flat(outputs: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether the values of documents lie one behind the other, [n·l, …]. Buckets of one-token documents do not tell."""
    telling = [(output, is_token) for output, is_token in outputs if is_token.shape[1] > 1]
    return all(
        output.ndim == 2 and output.shape[0] == is_token.numel() and (bool(telling) or output.shape[1] > 1)
        for output, is_token in telling or outputs
    )
