"""`cut_turns` cuts every prompt as by itself; what `turn_ids` says is exact stands for the very bytes of its texts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_plugins.masking import PromptMasker
from sft_plugins.masking.turns.ids import cut_turns, turn_ids
from sft_plugins.masking.turns.tokenizer import TextTokenizer
from testkit.conversations import CONVERSATIONS, TemplateKnobs
from testkit.properties import quiet
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
        (ids,) = turn_ids(text, cuts)
        for turn, own in zip(plan, ids, strict=True):
            if own.exact:
                assert text.decode_bytes(own.prompt) == (turn.prompt if turn.added is None else turn.added).encode()
                assert text.decode_bytes(own.response) == turn.response.encode()
                exact += 1
                apart += not own.joined
    assert exact > 30
    assert (apart > 30) == (kind == "bytelevel" and template == THOUGHT)


def cut_alone(text: TextTokenizer, prompt: str) -> list[str]:
    """The body of a prompt whose every joint is looked for from its beginning."""
    inner = [joint for joint in text.safe_joints(prompt) if joint]
    return [prompt[start:end] for start, end in pairwise([0, *inner])] or [""]


PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "</s>",
    "<s>",
    "user",
    "\n",
    "<|im_",
    "<|im_start",
    "a b",
    "start|>",
    "<",
    "|>",
    "é",
]


@quiet(max_examples=300)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=9), min_size=2, max_size=5), st.data())
def test_prompts_of_a_split_conversation_are_cut_as_each_by_itself(parts: list[list[str]], data: st.DataObject) -> None:
    """Each goes on from some beginning of the one before, so that cuts are taken over, or seem to be and may not be."""
    masker = PromptMasker(build_tokenizer("qwen", eos="</s>"))
    prompts: list[str] = []
    for one in map("".join, parts):
        before = prompts[-1] if prompts else ""
        prompts.append(before[: data.draw(st.integers(0, len(before)))] + one)
    turn = masker._plan({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo."}]})[0]
    turns = [turn._replace(prompt=prompt, added=None) for prompt in prompts]
    (cuts,) = cut_turns(masker._text, [turns]).turns
    for cut, prompt in zip(cuts, prompts, strict=True):
        joints = masker._text.safe_joints(prompt)
        assert "".join(cut.body) + cut.head == prompt
        assert cut.body == (cut_alone(masker._text, prompt) if joints else [prompt])
        assert cut.head == (prompt[joints[-1] :] if joints else "")
