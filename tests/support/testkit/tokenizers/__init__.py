"""Small real tokenizers, trained in code in a fraction of a second, and one fitted to each chat template of TRL.

Every kind is a tokenizer that people fine-tune with, in miniature: the same pre-tokenizer, the same treatment of the
first space, of bytes, digits and added tokens. Nothing is read from disk or network; trained once per process.

    kind            like                 what is hard about it
    bytelevel       GPT-2, SmolLM2       a word takes its leading space with it
    qwen            Qwen 2/3             single digits, newlines glued to punctuation
    merging         no pre-tokenizer     merges run across spaces, newlines and words: tokens straddle any text boundary
    llama3          Llama 3              BOS from a post-processor, digits in threes
    sp-bpe          Llama 2 (fast)       a `▁` before the first word, byte fallback, BOS
    sp-bpe-slow     Llama 2 (slow)       the same in Python: SentencePieceBackend
    sp-nodummy      Gemma                spaces become `▁`, none is added
    unigram         T5 without its EOS   Metaspace before the first word of every piece
    t5              T5                   whitespace runs and newlines are lost, EOS at the end: cannot be exact
    wordpiece       BERT                 lower-cased, whitespace lost: cannot be exact
    byt5            ByT5 (slow)          bytes, no vocabulary, pure Python, EOS at the end
"""

from __future__ import annotations

from testkit.tokenizers.fitted import (
    dump,
    has_generation_markers,
    new_templates,
    special_for,
    stop_ids_for_template,
    template_facts,
    template_names,
    tokenizer_for_template,
)
from testkit.tokenizers.kinds import CHATML, KINDS, LOSSY_KINDS, build_tokenizer

__all__ = [
    "CHATML",
    "KINDS",
    "LOSSY_KINDS",
    "build_tokenizer",
    "dump",
    "has_generation_markers",
    "new_templates",
    "special_for",
    "stop_ids_for_template",
    "template_facts",
    "template_names",
    "tokenizer_for_template",
]
