"""K samples for each of P prompts, the same ones whatever machine, rank count or training state draws them.

Invariant: what a batch says depends on the model, its rows and `(seed, batch id)` only. Batches are fixed before
    anything is drawn, bounded by memory (`plan_batches`), and every batch reseeds.

    prompts of 3, 9, 4 tokens × 2 samples, 4 rows a batch   rows sorted by length, so that little is padded
    batch 0   (0,0) (0,1) (2,0) (2,1)      padded on the left to 4: ids  0 a b c | 0 a b c | f g h i | f g h i
    batch 1   (1,0) (1,1)                                           mask 0 1 1 1 | …

Sampling is plain ancestral sampling from the model (temperature 1, top-p 1, top-k off): anything sharper would
measure the decoder's settings, not the model. Left padding is made here per call; the tokenizer is never asked to
pad.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sft_plugins._preserve import seeded
from sft_plugins.masking import PromptMasker

__all__ = ["Batch", "Sample", "generation_config", "model_context", "plan_batches", "sample_batch", "stop_token_ids"]

_MAX_BATCH_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Sample:
    """One answer. `token_ids` hold the stop token where there is one; `truncated` says that there is none."""

    prompt: int
    index: int
    token_ids: tuple[int, ...]
    text: str
    truncated: bool
    seed: int

    @property
    def without_stop(self) -> tuple[int, ...]:
        """`token_ids`, the stop token apart."""
        return self.token_ids if self.truncated else self.token_ids[:-1]


@dataclass(frozen=True)
class Batch:
    """Rows `(prompt, sample index)` that one `generate` call answers, drawn from `seed`."""

    id: int
    rows: tuple[tuple[int, int], ...]
    seed: int


def plan_batches(
    encoded: Sequence[Sequence[int]],
    samples_per_prompt: int,
    *,
    max_new_tokens: int,
    config: Any,
    seed: int,
    max_bytes: int = _MAX_BATCH_BYTES,
    max_rows: int | None = None,
) -> list[Batch]:
    """The fixed batches of a probe: every `(prompt, sample)` once, each batch within `max_bytes` of KV cache and
    logits.
    """
    order = sorted(range(len(encoded)), key=lambda p: (len(encoded[p]), p))
    rows = [(p, k) for p in order for k in range(samples_per_prompt)]
    longest = max(len(ids) for ids in encoded) + max_new_tokens
    per_batch = max(1, min(max_rows or len(rows), int(max_bytes // _row_bytes(config, longest))))
    return [
        Batch(i, tuple(rows[start : start + per_batch]), _mix(seed, i))
        for i, start in enumerate(range(0, len(rows), per_batch))
    ]


def _mix(seed: int, batch: int) -> int:
    # Not seed + batch: run seeds 0 and 1 would then share nearly all their batches.
    return (seed * 0x9E3779B1 + batch * 0x85EBCA77 + 0x165667B1) % 2**63


def _row_bytes(config: Any, length: int) -> int:
    """Upper bound of what one row holds: keys and values of every layer in 4 bytes, and four float32 rows of logits."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "head_dim", None) or text.hidden_size // (getattr(text, "num_attention_heads", None) or 1)
    cache = 2 * (getattr(text, "num_hidden_layers", None) or 1) * int(heads) * int(width) * 4 * length
    return cache + 4 * 4 * int(text.vocab_size)


def model_context(config: Any) -> int | None:
    """The longest sequence the model's positions allow; None where it states none."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(length := getattr(text, name, None), int) and length > 0:
            return length
    return None


def stop_token_ids(masker: PromptMasker, model: nn.Module) -> tuple[int, ...]:
    """Every id that ends an answer: those that the masker trains as stops (C12), and the model's own."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = configured if isinstance(configured, (list, tuple)) else [configured]
    return tuple(sorted({*masker.stop_token_ids, *(int(i) for i in own if i is not None)}))


def generation_config(*, max_new_tokens: int, stop_ids: Sequence[int], pad_id: int) -> GenerationConfig:
    """Ancestral sampling from the model's own distribution, with a KV cache, until a stop token or the limit."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        disable_compile=True,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        return_dict_in_generate=False,
    )


@contextmanager
def _no_defaults(model: nn.Module) -> Iterator[None]:
    """`generate` fills every None of a configuration from `model.generation_config`; inside, there is nothing to fill
    from.
    """
    owners = [
        (m, vars(m)["generation_config"]) for m in model.modules() if vars(m).get("generation_config") is not None
    ]
    try:
        for module, _ in owners:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, own in owners:
            module.generation_config = own


class _Finite(LogitsProcessor):
    """Keeps `multinomial` from meeting NaN: on an accelerator that is an assertion which ends the process, training
    and all.

    A row without a usable distribution becomes uniform and is remembered; nothing waits for the device until the end.
    """

    def __init__(self) -> None:
        self.bad: torch.Tensor | None = None

    def __call__(self, _: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        peak = scores.amax(dim=-1, keepdim=True)  # NaN if any is NaN, -inf if all are
        unusable = ~torch.isfinite(peak)
        self.bad = unusable.any() if self.bad is None else self.bad | unusable.any()
        return torch.where(unusable, torch.zeros_like(scores), scores)


def sample_batch(
    model: nn.Module,
    batch: Batch,
    encoded: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    config: GenerationConfig,
    device: torch.device,
) -> list[Sample]:
    """Answers of one batch, in the order of its rows. The caller has put the model into evaluation mode.

    Raises:
        RuntimeError: the logits were NaN or infinite.
    """
    width = max(len(encoded[p]) for p, _ in batch.rows)
    pad = int(config.pad_token_id)
    ids = torch.full((len(batch.rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)  # by position: the pad id may well be EOS
    for row, (p, _) in enumerate(batch.rows):
        ids[row, width - len(encoded[p]) :] = torch.tensor(encoded[p], dtype=torch.long)
        mask[row, width - len(encoded[p]) :] = 1
    finite = _Finite()
    with seeded(batch.seed), _no_defaults(model):
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=copy.deepcopy(config),
            logits_processor=LogitsProcessorList([finite]),
        )
    if finite.bad is not None and bool(finite.bad):
        raise RuntimeError("the model's logits are NaN or infinite while it answers")
    stops = set(config.eos_token_id or ())
    samples = []
    for (p, k), answer in zip(batch.rows, out[:, width:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(answer) if token in stops), None)
        kept = tuple(answer if end is None else answer[:end])
        text = tokenizer.decode(kept, skip_special_tokens=True).strip()
        samples.append(Sample(p, k, kept, text, end is None, batch.seed))
    return samples
