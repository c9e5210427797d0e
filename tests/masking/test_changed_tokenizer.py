"""What a tokenizer was given after its masker was made counts from the next batch on, as if the masker were made then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator
from sft_plugins.masking import masker as module
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
    "flags of a token": token("<|im_end|>", special=True, rstrip=True),
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
    if change != "a pad token":  # of which these rows are the same
        assert made != before


def test_text_that_has_become_a_special_token_is_refused() -> None:
    """Of a token that the vocabulary has had already, nothing but its flag says so."""
    tokenizer = build_tokenizer("bytelevel", chat_template=CHATML, eos="</s>")
    masker = PromptMasker(tokenizer)
    size, row = len(tokenizer), {"messages": say("Where?", "So.")}
    assert masker.encode(row)
    tokenizer.add_tokens([AddedToken("W", special=True)])
    assert len(tokenizer) == size
    with pytest.raises(MaskingError) as refused:
        masker.encode(row)
    assert refused.value.code == "special_token_in_content"


@pytest.mark.parametrize("fact", ["stop_token_ids", "stop_token_names", "notes", "reading"])
def test_what_a_masker_says_of_itself_is_of_the_tokenizer_as_it_is(fact: str) -> None:
    tokenizer = build_tokenizer("bytelevel", chat_template=NOTED, eos="</s>")
    masker = PromptMasker(tokenizer)
    before = getattr(masker, fact)
    tokenizer.eos_token = "!"
    tokenizer.chat_template = "{{ tone }}" + NOTED.replace("<|im_end|>", "</s>")
    assert getattr(masker, fact) == getattr(PromptMasker(tokenizer), fact) != before


def test_what_cannot_be_prepared_is_told_each_time_until_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("bytelevel", chat_template=CHATML, eos="</s>")
    masker = PromptMasker(tokenizer)

    def fail(*_: Any) -> Any:
        raise MaskingError("no.", code="bad_option", remedy="None.")

    tokenizer.add_tokens("<|new|>")
    with monkeypatch.context() as patch:
        patch.setattr(module, "find_stop_tokens", fail)
        for _ in range(2):
            with pytest.raises(MaskingError, match="no"):
                masker.encode_batch(ROWS)
    made = [[row.input_ids for row in one.rows] for one in masker.encode_batch(ROWS)]
    assert made == [[row.input_ids for row in one.rows] for one in PromptMasker(tokenizer).encode_batch(ROWS)]


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
