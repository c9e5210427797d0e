"""What a tokenizer was given after its masker was made counts from the next batch on, as if the masker were made then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken

from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator
from testkit.tokenizers import CHATML, build_tokenizer

NOTED = "{{ pad_token }}{{ unk_token }}" + CHATML  # what stands around the messages, special tokens in it


def say(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROWS: list[dict[str, Any]] = [
    *({"messages": [*say(f"Why {i}?", f"So it is, said {i}."), *say("And then?", "Nothing.")]} for i in range(12)),
    {"messages": say("<|new|> or so?", "Both <|new|>.")},
    {"messages": say("Why?", "So."), "chat_template_kwargs": {"tone": "kind"}},
    {"messages": say("Why?", "So."), "tools": [{"type": "function", "function": {"name": "look_up"}}]},
    {"prompt": "So it is, ", "response": "<|new|> it is."},
]


def token(text: str, **flags: bool) -> Callable[[Any], Any]:
    return lambda tokenizer: tokenizer.add_tokens([AddedToken(text, **flags)])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a new token": token("<|new|>"),
    "two new tokens": lambda tokenizer: tokenizer.add_tokens(["<|new|>", "said 7."]),
    "a token of the vocabulary": token("so"),
    "flags of a token": lambda tokenizer: token("<|im_end|>", special=True, lstrip=True)(tokenizer),
    "a special token": lambda tokenizer: tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]}),
    "a pad token": lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<|fill|>"}),
    "another pad token": lambda tokenizer: setattr(tokenizer, "pad_token", "w"),
    "another EOS": lambda tokenizer: setattr(tokenizer, "eos_token", "!"),
    "a template": lambda tokenizer: setattr(tokenizer, "chat_template", "So: " + NOTED),
    "a template that ends turns otherwise": lambda tokenizer: setattr(
        tokenizer, "chat_template", tokenizer.chat_template.replace("<|im_end|>", "</s>")
    ),
    "a template for tools": lambda tokenizer: setattr(
        tokenizer, "chat_template", {"default": NOTED, "tool_use": "{{ tools | tojson }}" + NOTED}
    ),
}


def outcomes(masker: PromptMasker) -> list[Any]:
    return [
        ([(row.input_ids, row.labels, row.role_tokens, row.modes) for row in one.rows], [str(e) for e in one.errors])
        for one in masker.encode_batch(ROWS)
    ]


@pytest.mark.parametrize("kind", ["bytelevel", "sp-bpe"])
@pytest.mark.parametrize("change", CHANGES)
def test_rows_are_those_of_a_masker_that_was_made_afterwards(change: str, kind: str) -> None:
    tokenizer = build_tokenizer(kind, chat_template=NOTED, eos="</s>")
    masker = PromptMasker(tokenizer, special_tokens_in_content="allow")
    before = [outcomes(masker) for _ in range(2)][1]  # the second time, from what it remembers of the first
    fingerprint = masker.fingerprint()
    CHANGES[change](tokenizer)
    after = PromptMasker(tokenizer, special_tokens_in_content="allow")
    made = outcomes(masker)
    assert made == outcomes(after)
    assert masker.stop_token_ids == after.stop_token_ids
    assert masker.stop_token_names == after.stop_token_names
    assert masker.notes == after.notes
    asked = {"messages": [{"role": "user", "content": "<|new|>?"}]}
    assert masker.encode_prompt(asked) == after.encode_prompt(asked)
    assert masker.fingerprint() == after.fingerprint() != fingerprint
    if change not in ("flags of a token", "a pad token"):  # of which these rows are the same
        assert made != before


def test_a_masker_is_prepared_anew_only_where_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("bytelevel", chat_template=NOTED, eos="</s>")
    masker = PromptMasker(tokenizer)
    prepared: list[int] = []
    own = PromptMasker._prepare
    monkeypatch.setattr(PromptMasker, "_prepare", lambda self: (prepared.append(1), own(self))[1])
    for _ in range(3):
        masker.encode_batch(ROWS)
        tokenizer(["a b c", "d"], padding="max_length", truncation=True, max_length=2)
    assert not prepared
    tokenizer.add_tokens("<|new|>")
    for _ in range(3):
        masker.encode_batch(ROWS)
    assert len(prepared) == 1


def test_a_collator_takes_ids_of_tokens_that_were_added_since() -> None:
    tokenizer = build_tokenizer("bytelevel", chat_template=CHATML, eos="</s>")
    collate = StrictPromptMaskingCollator(tokenizer, masker=PromptMasker(tokenizer))
    collate(ROWS[:2])
    tokenizer.add_tokens("<|new|>")
    row = {"messages": say("<|new|> or so?", "Both <|new|>.")}
    batch = collate([row])
    assert batch["input_ids"].max().item() == len(tokenizer) - 1
    assert collate([{name: values[0].tolist() for name, values in batch.items() if name != "attention_mask"}])
