"""What several benchmarks share: real conversations, a tokenizer, and the shapes of the models that are timed."""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
from datasets import Dataset

from sft_plugins.cli.demo.assets import chitchat_rows
from sft_plugins.masking import PromptMasker, mask_dataset

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with generation markers, which TRL needs and we do not."""

MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "1B": {  # the shape of Llama 3.2 1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
}


def load_tokenizer() -> tuple[Any, str]:
    """SmolLM2's tokenizer, or a small one trained here where its package is missing."""
    try:
        from sft_plugins.cli.demo.smollm2 import build_tokenizer as from_gguf
        from sft_plugins.cli.demo.smollm2 import gguf_file

        tokenizer, name = from_gguf(gguf_file()), "SmolLM2"
    except Exception as error:  # any of the optional packages missing
        from testkit.tokenizers import build_tokenizer

        print(f"SmolLM2's tokenizer is not available ({error}); using a small trained one", file=sys.stderr)
        tokenizer, name = build_tokenizer("bytelevel", eos="<|im_end|>"), "trained"
    tokenizer.chat_template = TEMPLATE
    return tokenizer, name


@functools.cache
def conversation_lengths(conversations: int = 1500) -> np.ndarray:
    """Tokens of real conversations, whole, under ChatML."""
    tokenizer, _ = load_tokenizer()
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in chitchat_rows()[:conversations]]
    return np.array([len(ids) for ids in tokenizer(texts)["input_ids"]])


def masked_conversations(tokenizer: Any, max_length: int, count: int) -> Dataset:
    """Real conversations as masked rows of at most `max_length` tokens."""
    masker = PromptMasker(tokenizer, max_length=max_length, overflow="keep_turns", errors="drop")
    rows = [{"messages": row["messages"]} for row in chitchat_rows()[:count]]
    return mask_dataset(Dataset.from_list(rows), masker).dataset
