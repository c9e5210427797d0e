"""What a template that rewrites history makes of the demo's conversations, and what prefix trees make of that.

Invariant: every figure is counted on the conversations at hand, under the template as TRL ships it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sft_plugins.cli.demo.assets import Row, to_dataset
from sft_plugins.masking import PromptMasker, mask_dataset
from sft_plugins.packing import pack_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERSATIONS = 20  # seconds: each of their answers is masked as a row of its own
CAPACITY = 16384


def under_qwen3(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> str | None:
    """One sentence on the first conversations under Qwen 3's template; None where it is not installed."""
    spec = find_spec("trl")
    template = Path(spec.origin or "").parent / "chat_templates" / "qwen3.jinja" if spec is not None else None
    if template is None or not template.is_file():
        return None
    theirs = copy.deepcopy(tokenizer)
    theirs.add_tokens(["<think>", "</think>"])
    theirs.chat_template = template.read_text(encoding="utf-8")
    masker = PromptMasker(theirs, max_length=CAPACITY, overflow="keep_turns", errors="drop")
    talks = [row for row in rows if len(row["messages"]) > 2][:CONVERSATIONS]
    masked, masking = mask_dataset(to_dataset(talks), masker)
    prefixes = pack_dataset(masked, CAPACITY, share_prefixes=True).report.prefixes
    assert prefixes is not None
    once = sum(len(theirs.apply_chat_template(row["messages"], return_dict=True)["input_ids"]) for row in talks)
    return (
        f"Under Qwen 3's template, which rewrites history, {masking.rows_in:,} of these conversations are {masking.rows_out:,} "
        f"rows, an answer each: {masking.tokens / once:.2f} times the tokens of one rendering. Packed with share_prefixes=True "
        f"they are {prefixes.tree_tokens / once:.2f} times; attention saved {prefixes.attention_saved:.0%}, all else "
        f"{prefixes.tokens_saved:.0%}."
    )
