"""The parts of tokenizers: what they are trained on, and their files."""

from __future__ import annotations

import functools
import io
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

_CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello there! How are you doing today? I'm fine, thanks.",
    "user\nassistant\nsystem\ntool\nYou are a helpful assistant.\n\nWhat is the weather in Paris? It is 21 degrees.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n\tprint(i, add(i, 2))\n",
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n<think>\nLet me think.\n</think>\n\n',
    "héllo wörld — 12345 + 67890 = 80235; привет мир; مرحبا; こんにちは; 2024-06-01",
    "The answer is 4. The answer is four. Please say it again, and say it slowly.\n1. one\n2. two\n3. three\n",
] * 8


GPT2_TOKENS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@functools.cache
def bytelevel_json(pattern: str | None) -> str:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    # Without a pattern a whole text is one "word": short lines keep the trainer from learning whole texts as tokens.
    corpus = _CORPUS if pattern else [line + "\n" for text in _CORPUS for line in text.split("\n")]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


@functools.cache
def _sentencepiece_model() -> bytes:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS), model_writer=buffer, vocab_size=500, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=True, remove_extra_whitespaces=False, normalization_rule_name="identity", split_digits=True,
        character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return buffer.getvalue()


@functools.cache
def sentencepiece_file() -> str:
    path = Path(tempfile.mkdtemp(prefix="testkit-")) / "tokenizer.model"
    path.write_bytes(_sentencepiece_model())
    return str(path)


@functools.cache
def sentencepiece_json(dummy_prefix: bool) -> str:
    vocab, _, merges = SentencePieceExtractor(sentencepiece_file()).extract()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:  # as LlamaTokenizer builds it
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        decoder.append(decoders.Strip(content=" ", left=1))
    else:  # as GemmaTokenizer builds it
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(decoder)
    return tokenizer.to_str()


@functools.cache
def unigram_json(keep_whitespace: bool) -> str:
    tokenizer = Tokenizer(models.Unigram())
    if keep_whitespace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    else:
        metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    alphabet = sorted({c for text in _CORPUS for c in text} | {chr(i) for i in range(32, 127)})
    trainer = trainers.UnigramTrainer(
        vocab_size=500, unk_token="<unk>", special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


@functools.cache
def wordpiece_json() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()
