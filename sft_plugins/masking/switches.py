"""Which switch of a chat template keeps its history as it was, so that a conversation is one row again.

Invariant: a switch is named only if, set on a conversation of the data, it gave that conversation in one row.

    {%- if preserve_thinking or loop.last %}<think>…      →      chat_template_kwargs={'preserve_thinking': True}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sft_plugins.masking.turns.modes import SWITCH

if TYPE_CHECKING:
    from sft_plugins.masking.masker import PromptMasker

_GIVEN = frozenset({
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception",
    "strftime_now", "date_string", "bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token",
    "mask_token", "additional_special_tokens",
})  # fmt: skip
"""Names that transformers gives a template: no switches."""


def switches_without_split(masker: PromptMasker, row: Mapping[str, Any]) -> list[str]:
    """`name=value` of each switch of the template under which `row`, which is split, stays one row.

    Modes (`enable_thinking` and its like) are left alone: they change what generation is asked.
    """
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        return []
    names = sorted(masker.reading.variables - _GIVEN - row.keys() - kwargs.keys())
    names = [name for name in names if not SWITCH.fullmatch(name)]
    tried = [(name, value) for name in names for value in (True, False)]
    outcomes = masker.encode_batch([{**row, "chat_template_kwargs": {**kwargs, name: value}} for name, value in tried])
    return [
        f"{name}={value}"
        for (name, value), outcome in zip(tried, outcomes, strict=True)
        if len(outcome.rows) == 1 and not outcome.errors
    ]
