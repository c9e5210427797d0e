"""What each form of a row becomes: every column that belongs to the prompt is in the prompt that is trained on."""

from __future__ import annotations

from typing import Any

import pytest

from sft_plugins.masking import PromptMasker
from testkit.tokenizers import build_tokenizer


def prompt_and_answer(row: dict[str, Any], *, chat: bool) -> tuple[str, str]:
    """The texts of a masked row in front of, and in, its loss."""
    tokenizer = build_tokenizer("qwen")
    if not chat:
        tokenizer.chat_template = None
    (made,) = PromptMasker(tokenizer).encode(row)
    ids, labels = list(made.input_ids), list(made.labels)
    start = next(at for at, label in enumerate(labels) if label != -100)
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
STANFORD = "### Instruction:\nAdd the numbers.\n\n### Input:\n2 and 2\n\n### Response:"


def test_an_alpaca_rows_input_is_in_the_prompt() -> None:
    row = {"instruction": "Add the numbers.", "input": "2 and 2", "output": "4"}
    prompt, answer = prompt_and_answer(row, chat=True)
    assert prompt == CHATML.format("Add the numbers.\n\n2 and 2")
    assert answer.startswith("4<|im_end|>")
    prompt, answer = prompt_and_answer(row, chat=False)
    assert prompt.endswith(STANFORD)
    assert "paired with an input" in prompt
    assert answer.startswith("4")


@pytest.mark.parametrize("extra", [{}, {"input": None}, {"input": ""}])
def test_an_alpaca_row_without_input_has_none_in_the_prompt(extra: dict[str, Any]) -> None:
    row = {"instruction": "Say hello.", "output": "Hello!", **extra}
    assert prompt_and_answer(row, chat=True)[0] == CHATML.format("Say hello.")
    prompt, _ = prompt_and_answer(row, chat=False)
    assert prompt.endswith("\n\n### Instruction:\nSay hello.\n\n### Response:")
    assert "input" not in prompt
