"""Slow and obviously right: does a masked row hold the four invariants, and if a row was refused, was there a reason?

Written from the contract alone, with nothing but `apply_chat_template`, `tokenizer.__call__` and `decode`. For every
supervised turn k:

0. Mode          of the generation prompts that the template's switches give, the one that the rendered turn goes on from;
                 of several the longest; where none, the prompt and the message's own text behind it (continuation)
1. Parity        ids before the run == apply_chat_template(messages[:k], add_generation_prompt=True, tokenize=True)
2. Coverage      the run decodes to what the template renders for the turn, from there to a stop token, and holds the
                 content, reasoning and tool calls of the data verbatim but for whitespace at their ends
3. Stop          the last id of the run stops generation; after it the template adds whitespace and special tokens only
4. Nothing else  every label is -100 or its id, the first is -100, every trainable turn is supervised exactly once

`violations` returns what is wrong with rows that were made, `refusals` which error codes would be justified.
"""

from __future__ import annotations

from testkit.mask_oracle.content import trainable
from testkit.mask_oracle.meaning import meant
from testkit.mask_oracle.questions import refusals, runs, structure, violations
from testkit.mask_oracle.reference import Row, reference_rows
from testkit.mask_oracle.template import CODES, IGNORE, decode
from testkit.mask_oracle.turn import continuation, tokenisations

__all__ = [
    "CODES",
    "IGNORE",
    "Row",
    "continuation",
    "decode",
    "meant",
    "reference_rows",
    "refusals",
    "runs",
    "structure",
    "tokenisations",
    "trainable",
    "violations",
]
