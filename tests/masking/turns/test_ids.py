"""`turn_ids`: what it says is exact stands for the very bytes of its texts, joined to its prompt or tokenised apart."""

from __future__ import annotations

import pytest

from sft_plugins.masking import PromptMasker
from sft_plugins.masking.turns.ids import cut_turns, turn_ids
from testkit.conversations import CONVERSATIONS, TemplateKnobs
from testkit.tokenizers import CHATML, build_tokenizer

# The second ends its header on white space that byte-level pieces join with the first line feed of an answer.
THOUGHT = TemplateKnobs(generation_prompt="empty_think", reasoning="always_block").jinja()
KINDS = ("bytelevel", "qwen", "merging", "llama3", "sp-bpe", "sp-nodummy")


@pytest.mark.parametrize("template", [CHATML, THOUGHT], ids=["chatml", "thought closed"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_to_be_exact_is(kind: str, template: str) -> None:
    masker = PromptMasker(build_tokenizer(kind, chat_template=template, eos="</s>"))
    text = masker._text
    exact = apart = 0
    for entry in CONVERSATIONS:
        plan = masker._plan(entry.for_tokenizer("</s>"))
        if not isinstance(plan, list):
            continue
        cuts = cut_turns(text, [plan])
        (ids,) = turn_ids(text, cuts, text.encode(cuts.texts))
        for turn, own in zip(plan, ids, strict=True):
            if own.exact:
                assert text.decode_bytes(own.prompt) == (turn.prompt if turn.added is None else turn.added).encode()
                assert text.decode_bytes(own.response) == turn.response.encode()
                exact += 1
                apart += not own.joined
    assert exact > 30
    assert (apart > 30) == (kind == "bytelevel" and template == THOUGHT)
