"""C12, C16 of `docs/known-failures.md`: what is asked and where an answer stops follow the masker's rules."""

from __future__ import annotations

from tokenizers import AddedToken

from sft_plugins.collapse.probe.prompts import encode_prompts, load_prompts
from sft_plugins.collapse.probe.sampling import stop_token_ids
from sft_plugins.masking import PromptMasker
from testkit.watched_runs import (
    byte_tokenizer,
    tiny_model,
)


def test_what_is_trained_as_a_stop_stops_the_watch() -> None:
    """C12: the end of turn is an added token, the EOS another one, as in Llama 3's files."""
    tokenizer = byte_tokenizer(chat_template=None)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|turn|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    end = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert end not in tokenizer.all_special_ids, "or this test shows nothing"
    masker = PromptMasker(tokenizer)
    (row,) = masker.encode({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]})
    assert row.labels[-1] == end
    model = tiny_model(vocab_size=len(tokenizer))
    stops = set(stop_token_ids(masker, model))
    assert stops >= masker.stop_token_ids | {end, tokenizer.eos_token_id}


THINKING = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% for t in tools or [] %}{{ 'tool ' + t['function']['name'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)


TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def test_prompts_carry_what_rows_carry() -> None:
    """C16: each prompt by itself, and all of them at once; a prompt's own goes before."""
    tokenizer = byte_tokenizer(chat_template=THINKING)
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    prompts = load_prompts(
        [
            "A?",
            {"prompt": "B?", "chat_template_kwargs": on},
            {"messages": [{"role": "user", "content": "C?"}], "tools": [TOOL]},
        ],
        chat_template_kwargs=off,
    )
    encoded = encode_prompts(prompts, PromptMasker(tokenizer), max_new_tokens=1, context=None)
    texts = [tokenizer.decode(ids) for ids in encoded]
    assert texts == [
        "user:A?\nassistant:<think></think>",
        "user:B?\nassistant:",
        "user:C?\ntool clock\nassistant:<think></think>",
    ]


def test_prompts_in_parts_and_with_calls_are_asked() -> None:
    """C16: text in parts, a call of a tool and its result stand before the question."""
    prompts = load_prompts(
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "What time is it?"}]},
                    {
                        "role": "assistant",
                        "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {}}}],
                    },
                    {"role": "tool", "content": "noon"},
                ]
            }
        ]
    )
    assert prompts[0].text == "What time is it?\nnoon"
