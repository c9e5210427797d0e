"""How much of an answer is reasoning: the text between a model's own delimiters, wherever the prompt or the answer opens them.

prompt ends "…<think>\n"   answer "First, 2 + 2 …</think>4"     reasoning "First, 2 + 2 …"
prompt ends "…assistant\n" answer "<think>\n\n</think>\n\n4"    reasoning "": an empty block is no reasoning
prompt ends "…assistant\n" answer "<think>First, 2 + 2 …"       reasoning "First, 2 + 2 …": cut off while it reasons
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["DELIMITERS", "reasoning_in", "reasoning_tokens"]

_PROMPT_TAIL = 24
"""Tokens of the prompt's end in which a block of reasoning may be opened."""

DELIMITERS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, SmolLM3, …
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<unused94>thought", "<unused95>"),  # MedGemma
)


def reasoning_in(prompt: str, answer: str) -> str:
    """The reasoning in `answer`, all blocks of it joined and without white space around; "" where there is none.

    Args:
        prompt: the text before the answer, special tokens included; a block that it opens and leaves open goes on in the
            answer, and one that it opens and closes is a switch against reasoning.
        answer: with its special tokens, since some delimiters are such tokens.
    """
    for opening, closing in DELIMITERS:
        text = answer
        if prompt.rstrip().endswith(opening):
            text = opening + answer
        blocks = []
        while opening in text:
            _, _, text = text.partition(opening)
            block, _, text = text.partition(closing)
            blocks.append(block.strip())
        if reasoning := "\n".join(block for block in blocks if block):
            return reasoning
    return ""


def reasoning_tokens(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """Tokens of reasoning in an answer, 0 where there is none; `prompt` and `answer` are ids."""
    tail = tokenizer.decode(list(prompt[-_PROMPT_TAIL:]), skip_special_tokens=False)
    reasoning = reasoning_in(tail, tokenizer.decode(list(answer), skip_special_tokens=False))
    return len(tokenizer(reasoning, add_special_tokens=False)["input_ids"]) if reasoning else 0
