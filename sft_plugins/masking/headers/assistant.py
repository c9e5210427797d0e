"""Does a mask that claims to cover every assistant turn of a tokenised row cover them all?

The assistant's header is known exactly: it is what the template adds for a generation prompt. Searching for it serves this
check of other people's masks only; masks made here never come from searching ids.
"""

from __future__ import annotations

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import MaskingError
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.tokenized import Tokenized
from sft_plugins.masking.rendering.template import ChatRenderer
from sft_plugins.masking.turns.tokenizer import TextTokenizer


def assistant_header(text: TextTokenizer, renderer: ChatRenderer) -> list[int]:
    """Ids of the template's generation prompt; empty if it has none, or nothing in it that marks the place."""
    if not renderer.available:
        return []
    messages = [{"role": "user", "content": "Zquestionq"}]
    conversation = Conversation(messages, [False])
    try:
        without, prompt = (renderer.render(messages, conversation, generation_prompt=flag) for flag in (False, True))
    except MaskingError:  # a template that cannot render a lone question; then nothing is known of its header
        return []
    header = text.encode([prompt[len(without) :]])[0] if prompt.startswith(without) else []
    return header if text.special_ids.intersection(header) else []


def turn_starts(ids: np.ndarray, header: list[int]) -> np.ndarray:
    """Positions right after an assistant header, int64 `[K]`; none at the very end."""
    width = len(header)
    if not width or len(ids) <= width:
        return np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, width)
    starts = np.flatnonzero((windows == np.asarray(header)).all(axis=1)) + width
    return starts[starts < len(ids)]


def unsupervised_turns(ids: np.ndarray, labels: np.ndarray, header: list[int]) -> np.ndarray:
    """Positions right after an assistant header, int64 `[K]`, where no token up to the next one carries loss.

    The first ones need not: a generation prompt may go on behind the header (an empty thought, Qwen 3).
    """
    starts = turn_starts(ids, header)
    carried = np.concatenate([[0], np.cumsum(labels != IGNORE_INDEX)])
    ends = np.append(starts[1:], len(ids))
    return starts[carried[ends[: len(starts)]] == carried[starts]]


def check_every_turn_supervised(row: Tokenized, text: TextTokenizer, renderer: ChatRenderer) -> None:
    """Raises:
    MaskingError: `unsupervised_turn` where an assistant header is followed by a token without loss.
    """
    missed = unsupervised_turns(np.asarray(row.input_ids), np.asarray(row.labels), assistant_header(text, renderer))
    if missed.size:
        raise MaskingError(
            f"`assistant_masks` covers some assistant turns only: {missed.size} more begin without loss, "
            f"the first at position {int(missed[0])}.",
            code="unsupervised_turn",
            remedy='Mask all of them, give `labels` instead to leave turns out on purpose, or use {train_on:train_on="last"}.',
        )
