"""Tier 1 as a probe runs it: the model reads given answers, and every supervised token is judged. Nothing is generated.

Two kinds of rows: held-out pairs (what the user trusts as right answers) and frozen samples of the baseline (what the
model used to say). The forward is the probe's own, without gradients, on rows of its own, so a host's fused loss that
returns no logits changes nothing (C10); logits are asked for at supervised positions only and in slices, so they stay
bounded (C7).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins._preserve import adapter_off
from sft_plugins.collapse.metrics.entropy import (
    TokenStatistics,
    concatenate,
    supervised_positions,
    token_statistics_from_logits,
)
from sft_plugins.collapse.probe.sampling import Sample
from sft_plugins.errors import CollapseError
from sft_plugins.masking import PromptMasker

__all__ = ["Judged", "LabelledText", "eval_rows", "frozen_rows", "judge_rows", "plan_rows"]

_LOGIT_BYTES = 2**29
_ROW_TOKENS = 8192
_FROZEN_PER_PROMPT = 2
"""Baseline answers per prompt that are read again at every probe."""


@dataclass(frozen=True)
class LabelledText:
    """One text: `labels` are −100 where nothing is judged."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Judged:
    """Every supervised token of a list of rows, in order: statistics, row index and place in its answer, each `[N]`."""

    stats: TokenStatistics
    row: Tensor
    offset: Tensor

    @staticmethod
    def join(parts: Sequence[Judged]) -> Judged:
        empty = torch.empty(0, dtype=torch.long)
        return Judged(
            concatenate([p.stats for p in parts]),
            torch.cat([p.row for p in parts] or [empty]),
            torch.cat([p.offset for p in parts] or [empty]),
        )


def eval_rows(pairs: Any, masker: PromptMasker, *, context: int | None, limit: int) -> tuple[LabelledText, ...]:
    """The first `limit` held-out pairs as rows.

    Args:
        pairs: rows with `input_ids` and `labels` (what `mask_dataset` gives), or anything `PromptMasker` reads.
        context: longer rows are refused, not cut: a cut answer would be judged without its end.

    Raises:
        CollapseError: `no_eval_pairs`, `eval_pair` (with its row), `no_supervised_tokens`.
    """
    rows: list[LabelledText] = []
    for index, pair in enumerate(pairs):
        if len(rows) >= limit:
            break
        if not isinstance(pair, Mapping):
            raise CollapseError(
                f"a held-out pair is a row of named columns, got {type(pair).__name__}",
                code="eval_pair",
                row=index,
                remedy="pass a data set, or a list of rows, not a single row",
            )
        if pair.get("seq_lengths") is not None:
            raise CollapseError(
                "the pair is packed (it has `seq_lengths`): read as one text, its documents would see one another",
                code="eval_pair",
                row=index,
                remedy="{packed_heldout:pass the rows that were packed, as mask_dataset gives them}",
            )
        if "input_ids" in pair and "labels" in pair:
            encoded = [(list(map(int, pair["input_ids"])), list(map(int, pair["labels"])))]
        else:
            try:
                encoded = [(e.input_ids, e.labels) for e in masker.encode(dict(pair))]
            except Exception as error:
                raise CollapseError(
                    f"this pair cannot be masked: {getattr(error, 'message', error)}",
                    code="eval_pair",
                    row=index,
                    remedy=getattr(error, "remedy", None) or "pass a row of a form that PromptMasker takes",
                ) from error
        for ids, labels in encoded:
            if len(ids) != len(labels):
                raise CollapseError(
                    f"{len(ids)} ids but {len(labels)} labels",
                    code="eval_pair",
                    row=index,
                    remedy="give one label per id: the id where it is judged, -100 elsewhere",
                )
            if context is not None and len(ids) > context:
                raise CollapseError(
                    f"the pair has {len(ids)} tokens, the model takes {context}",
                    code="eval_pair",
                    row=index,
                    remedy="leave it out or shorten it",
                )
            if all(label == IGNORE_INDEX for label in labels[1:]):
                raise CollapseError(
                    "no token of this evaluation pair is supervised: there is nothing to judge",
                    code="no_supervised_tokens",
                    row=index,
                    remedy="{heldout_rows:pass rows whose labels are not all -100, or a prompt with its response}",
                )
            rows.append(LabelledText(tuple(ids), tuple(labels)))
    if not rows:
        raise CollapseError(
            "eval_pairs is empty", code="no_eval_pairs", remedy="{no_heldout:pass pairs, or leave it None}"
        )
    return tuple(rows)


def frozen_rows(samples: Sequence[Sample], encoded: Sequence[Sequence[int]]) -> list[LabelledText]:
    """Some of the baseline's answers behind their prompts, `encoded` by prompt, as rows of which the answers are judged."""
    rows = []
    for sample in samples:
        if sample.index < _FROZEN_PER_PROMPT and sample.token_ids:
            prompt = tuple(encoded[sample.prompt])
            rows.append(LabelledText(prompt + sample.token_ids, (IGNORE_INDEX,) * len(prompt) + sample.token_ids))
    return rows


def plan_rows(rows: Sequence[LabelledText], *, max_tokens: int = _ROW_TOKENS) -> list[tuple[int, ...]]:
    """Fixed batches of row indices of similar length, at most `max_tokens` with their padding (one row at least)."""
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids), i)):
        # Ascending, so the newest row is the widest of its batch.
        if batch and (len(batch) + 1) * len(rows[index].input_ids) > max_tokens:
            batches.append(tuple(batch))
            batch = []
        batch.append(index)
    return [*batches, tuple(batch)] if batch else batches


def judge_rows(
    model: nn.Module, rows: Sequence[LabelledText], batch: Sequence[int], *, against_base: bool = False
) -> Judged:
    """Token statistics of the rows `batch` names; with `against_base` also KL(now ‖ base), the base being adapter-off.

    The caller has put the model into evaluation mode.
    """
    width = max(len(rows[i].input_ids) for i in batch)
    device = next(model.parameters()).device
    # Padded on the right, by position: what follows a token cannot change it.
    ids = torch.tensor([[*rows[i].input_ids, *[0] * (width - len(rows[i].input_ids))] for i in batch])
    labels = torch.tensor([[*rows[i].labels, *[IGNORE_INDEX] * (width - len(rows[i].labels))] for i in batch])
    mask = torch.tensor([[1] * len(rows[i].input_ids) + [0] * (width - len(rows[i].input_ids)) for i in batch])
    found = supervised_positions(labels)
    ids, mask = ids.to(device), mask.to(device)
    parts, order = [], []
    for columns, here in _slices(model, found.column, len(batch)):
        now = _logits(model, ids, mask, columns, found.row[here], found.column[here])
        base = None
        if against_base:
            with adapter_off(model):
                base = _logits(model, ids, mask, columns, found.row[here], found.column[here])
        parts.append(token_statistics_from_logits(now, found.target[here].to(now.device), base_logits=base))
        order.append(here)
    back = torch.argsort(torch.cat(order))
    stats = concatenate(parts)
    stats = TokenStatistics(*(None if v is None else v[back] for v in vars(stats).values()))
    return Judged(stats, torch.tensor(batch)[found.row], found.offset)


def adapter_effect(model: nn.Module, ids: Sequence[int]) -> float:
    """How much the adapter changes the logits after `ids`: the largest difference, relative to the largest logit of the base.

    0.0 for an adapter as PEFT begins one. The caller has put the model into evaluation mode.
    """
    row = torch.tensor([list(ids)], device=next(model.parameters()).device)
    mask, last = torch.ones_like(row), torch.tensor([row.shape[1] - 1])

    def logits() -> Tensor:
        return _logits(model, row, mask, last, torch.tensor([0]), last).float()

    now = logits()
    with adapter_off(model):
        base = logits()
    return float((now - base).abs().max() / base.abs().max())


def _slices(model: nn.Module, column: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The supervised columns in slices whose logits stay bounded, each with the indices of the positions in it."""
    wanted = torch.unique(column)
    vocabulary = int(model.config.get_text_config().vocab_size)
    size = max(1, _LOGIT_BYTES // (4 * vocabulary * rows))
    for start in range(0, len(wanted), size):
        columns = wanted[start : start + size]
        yield columns, torch.isin(column, columns).nonzero()[:, 0]


def _logits(model: nn.Module, ids: Tensor, mask: Tensor, columns: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """`model(ids).logits[row, column]`, `[n, V]`, without the logits of other columns where the model can leave them
    out.
    """
    device = ids.device
    if _keeps_logits(model):
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=columns.to(device))
        place = torch.searchsorted(columns, column)
    else:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False)
        place = column
    return out.logits[row.to(device), place.to(device)]


def _keeps_logits(model: nn.Module) -> bool:
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    # The class's own signature: hosts wrap the instance's forward in functions that take anything.
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters
