"""What a model makes of rows it never trained on: mean loss per supervised token, and one greedy answer.

Computed plainly and apart from any trainer, so that the figures before and after training mean the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sft_plugins._constants import IGNORE_INDEX

MaskedRow = Mapping[str, Any]


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: Sequence[MaskedRow]) -> float:
    """−Σ m_t log P(x_t | x_<t) / Σ m_t over all rows, in nats per supervised token; one row at a time, dropout off."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([list(row["input_ids"])], device=device)
        labels = torch.tensor(list(row["labels"]), device=device)[1:]  # position t predicts token t + 1
        log_p = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
        supervised = labels != IGNORE_INDEX
        total -= log_p[supervised].gather(1, labels[supervised, None]).double().sum().item()
        count += int(supervised.sum())
    model.train(was_training)
    return total / count


def first_exchange(tokenizer: Any, row: MaskedRow) -> tuple[list[int], str]:
    """`(prompt ids, reference answer)` of the row's first supervised turn. Works for every form of row: masks mark both."""
    labels = list(row["labels"])
    start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    end = next((i for i in range(start, len(labels)) if labels[i] == IGNORE_INDEX), len(labels))
    answer = tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=True)
    return list(row["input_ids"][:start]), answer.strip()


@torch.no_grad()
def greedy_answer(
    model: Any, tokenizer: Any, prompt_ids: Sequence[int], *, stops: Sequence[int], most: int = 48
) -> str:
    """The likeliest answer, token by token, up to a stop token; "…" where it was cut after `most` tokens."""
    ids = torch.tensor([list(prompt_ids)], device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
    )[0, ids.shape[1] :].tolist()
    model.train(was_training)
    ended = bool(made) and made[-1] in set(stops)
    return tokenizer.decode(made, skip_special_tokens=True).strip() + ("" if ended else " …")
