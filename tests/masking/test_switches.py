"""Where a conversation is split, the report says what a switch of its template, or packing, would save."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from sft_plugins.masking import PromptMasker, mask_dataset
from testkit.conversations import assistant, user
from testkit.tokenizers import tokenizer_for_template

ROW = {
    "messages": [
        message
        for i in range(3)
        for message in (user(f"Question {i}"), assistant(f"Answer {i}", reasoning_content=f"Thought {i}"))
    ]
}


def masker(condition: str, **options: Any) -> PromptMasker:
    """Qwen 3, which keeps the thoughts of earlier turns where `condition` holds."""
    tokenizer = tokenizer_for_template("qwen3")
    template = tokenizer.chat_template
    assert "loop.index0 > ns.last_query_index" in template
    return PromptMasker(
        tokenizer, chat_template=template.replace("loop.index0 > ns.last_query_index", condition), **options
    )


@pytest.mark.parametrize(
    ("condition", "switch"),
    [
        ("preserve_thinking or loop.index0 > ns.last_query_index", "preserve_thinking=True"),
        ("clear_thinking is false or loop.index0 > ns.last_query_index", "clear_thinking=False"),
        ("loop.index0 > ns.last_query_index", None),
        ("loop.index0 > ns.last_query_index and not other", None),  # a switch that keeps nothing
        ("enable_thinking is false or loop.index0 > ns.last_query_index", None),  # a mode: it changes what is asked
    ],
)
def test_a_switch_is_named_where_it_was_tried(condition: str, switch: str | None) -> None:
    rows = Dataset.from_list([{"messages": ROW["messages"][:2]}, ROW])
    report = mask_dataset(rows, masker(condition)).report
    assert (report.rows_in, report.split_rows) == (2, 1)
    named = [note for note in report.notes if "keeps its history" in note]
    assert len(named) == (switch is not None)
    if switch is not None:
        assert f"under {switch} (chat_template_kwargs)" in named[0]
        name, _, value = switch.partition("=")
        kwargs = {name: value == "True"}
        once = mask_dataset(Dataset.from_list([ROW | {"chat_template_kwargs": kwargs}]), masker(condition)).report
        assert (once.split_rows, once.rows_out) == (0, 1)


def test_the_report_says_what_one_rendering_and_packing_come_to() -> None:
    report = mask_dataset(Dataset.from_list([ROW]), masker("loop.index0 > ns.last_query_index")).report
    said = " ".join(str(report).split())
    assert f"rendered once they would be {report.tokens - report.repeated_tokens:,}" in said
    assert "share_prefixes=True" in said
    plain = mask_dataset(Dataset.from_list([{"messages": ROW["messages"][:2]}]), masker("true")).report
    assert "share_prefixes" not in str(plain)
