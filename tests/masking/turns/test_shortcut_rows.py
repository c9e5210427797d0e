"""Rows are the same without the shortcuts of masking: patterns, traces, one rendering for prefixes, cuts at special tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sft_plugins.masking import PromptMasker
from sft_plugins.masking.planning.patterns import Patterns
from sft_plugins.masking.rendering.prefixes import WatchedTemplate
from sft_plugins.masking.rendering.quick import QuickConversation
from sft_plugins.masking.turns.tokenizer import TextTokenizer
from testkit import mask_oracle
from testkit.conversations import BY_NAME, CONVERSATIONS, TemplateKnobs
from testkit.tokenizers import CHATML, build_tokenizer, tokenizer_for_template


def outcomes(tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> list[Any]:
    made = PromptMasker(tokenizer, **options).encode_batch(rows)
    return [([(r.input_ids, r.labels) for r in one.rows], [(e.code, e.message) for e in one.errors]) for one in made]


def without_shortcuts(monkeypatch: pytest.MonkeyPatch, function: Callable[[], list[Any]]) -> list[Any]:
    with monkeypatch.context() as patch:
        patch.setattr(Patterns, "turns", lambda self, conversation, indices, anew: anew())
        patch.setattr(WatchedTemplate, "prefixes", lambda self, messages, variables: None)
        patch.setattr(QuickConversation, "render", lambda self, end, generation_prompt: None)
        patch.setattr(TextTokenizer, "is_safe_joint", lambda self, text: False)
        patch.setattr(TextTokenizer, "safe_joints", lambda self, text, start=0: [])
        return function()


STRIP = TemplateKnobs(reasoning="strip_history").jinja()


KINDS = ("bytelevel", "qwen", "merging", "llama3", "sp-bpe", "sp-nodummy", "unigram", "sp-bpe-slow")


@pytest.mark.parametrize("template", [CHATML, STRIP], ids=["chatml", "strips_reasoning"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_without_shortcuts(kind: str, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer(kind, chat_template=template, eos="</s>")
    rows = [entry.for_tokenizer("<|im_end|>") for entry in CONVERSATIONS if entry.name != "very_long_turn"]
    fast = outcomes(tokenizer, rows)
    plain = without_shortcuts(monkeypatch, lambda: outcomes(tokenizer, rows))
    for entry, one, other in zip([e for e in CONVERSATIONS if e.name != "very_long_turn"], fast, plain, strict=True):
        assert one == other, entry.name
    assert sum(len(made) for made, _ in fast) >= 15


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_exact_either_way_where_the_header_ends_inside_a_word(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`[assistant] ` ends on a space that some tokenizers would join with the answer: its ids may then differ, not its text."""
    knobs = TemplateKnobs(header="[{role}] ", end="</s>", reasoning="drop")
    tokenizer = build_tokenizer(kind, chat_template=knobs.jinja(), eos="</s>")
    masker = PromptMasker(tokenizer)
    rows = [
        BY_NAME[key].for_tokenizer("") for key in ("many_turns", "multi_line", "repeated_answer", "whitespace_at_ends")
    ]
    for row in rows:
        for made in (masker.encode(row), without_shortcuts(monkeypatch, lambda row=row: masker.encode(row))):
            assert mask_oracle.violations(tokenizer, row, made, stop_ids={tokenizer.eos_token_id}) == []


@pytest.mark.parametrize("name", ["phi3", "llama3", "qwen3", "gemma", "glm4moe", "deepseekv3"])
def test_rows_of_real_templates_are_the_same_without_shortcuts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_for_template(name)
    rows = [BY_NAME[key].for_tokenizer("") for key in ("many_turns", "system", "unicode", "repeated_answer", "code")]
    fast = outcomes(tokenizer, rows)
    assert without_shortcuts(monkeypatch, lambda: outcomes(tokenizer, rows)) == fast
