"""Headers that a model writes itself: in the middle of its turn, or where the generation prompt is empty.

    gpt-oss             assistant<|channel|>analysis<|message|>…<|end|> [<|start|>]assistant<|channel|>final<|message|>…
    Diffusion Gemma     …<tool_response|> [<|turn>]model\\n…

An exact mask puts loss on them. Which those are is read off exact masks of conversations made up for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import MaskingError
from sft_plugins.masking.examples.messages import REASONING_KEYS
from sft_plugins.masking.masker import PromptMasker

_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "Where."}}},
    },
}


@dataclass(frozen=True)
class OwnHeaders:
    """Where the token `opening`, which begins headers, is the model's own.

    Attributes:
        behind: beginnings of messages, up to their text, behind which the same turn opens another.
        after: tokens behind which a turn begins with its own header.
    """

    opening: int
    behind: frozenset[tuple[int, ...]]
    after: frozenset[int]

    def has(self, ids: np.ndarray, labels: np.ndarray, at: int) -> bool:
        """Whether the `opening` at `at`, which carries loss, is one that the model writes."""
        if at and labels[at - 1] == IGNORE_INDEX:
            return int(ids[at - 1]) in self.after
        begun = np.flatnonzero(ids[:at] == self.opening)
        if not len(begun):
            return False
        message = ids[begun[-1] : at].tolist()
        return any(tuple(message[: len(beginning)]) == beginning for beginning in self.behind)


def find_own_headers(tokenizer: Any, opening: int, special: frozenset[int]) -> OwnHeaders:
    """Those of the tokenizer's own template; `special` are ids of special tokens."""
    masker = PromptMasker(tokenizer)
    behind: set[tuple[int, ...]] = set()
    after: set[int] = set()
    for one, other in _pairs():
        try:
            rows = list(zip(masker.encode(one), masker.encode(other), strict=True))
        except (MaskingError, ValueError):  # not under this template
            continue
        for a, b in rows:
            places = [list(_supervised(row.input_ids, row.labels, opening)) for row in (a, b)]
            for at, there in zip(*places, strict=False):
                if a.labels[at - 1] == IGNORE_INDEX:
                    after.add(a.input_ids[at - 1])
                    continue
                both = zip(_message(a.input_ids, at, opening), _message(b.input_ids, there, opening), strict=False)
                shared = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], both)]
                while len(shared) > 1 and shared[-1] not in special:  # what may merge with the text
                    shared.pop()
                behind.add(tuple(shared))
    return OwnHeaders(opening, frozenset(behind), frozenset(after))


def _pairs() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Conversations twice, with other texts: reasoning under each of its names, calls, and both."""
    for key in (None, *REASONING_KEYS):
        yield _answer(key, "Abc"), _answer(key, "Xyz")
        yield _call(key, "Abc"), _call(key, "Xyz")


def _answer(key: str | None, text: str) -> dict[str, Any]:
    thought = {} if key is None else {key: f"{text} thought."}
    return {
        "messages": [
            {"role": "user", "content": "Well?"},
            {"role": "assistant", "content": f"{text} answer.", **thought},
        ]
    }


def _call(key: str | None, text: str) -> dict[str, Any]:
    thought = {} if key is None else {key: f"{text} thought."}
    call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": text}}}
    return {
        "messages": [
            {"role": "user", "content": "Well?"},
            {"role": "assistant", "content": "", "tool_calls": [call], **thought},
            {"role": "tool", "tool_call_id": "call00001", "name": "look", "content": f"{text} result."},
            {"role": "assistant", "content": f"{text} answer.", **thought},
        ],
        "tools": [_TOOL],
    }


def _supervised(ids: list[int], labels: list[int], opening: int) -> Iterator[int]:
    return (at for at, (token, label) in enumerate(zip(ids, labels, strict=True)) if token == label == opening)


def _message(ids: list[int], at: int, opening: int) -> list[int]:
    """Ids from the last `opening` before `at`."""
    begun = max((i for i in range(at) if ids[i] == opening), default=at)
    return ids[begun:at]
