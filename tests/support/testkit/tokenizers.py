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

import copy
import functools
import importlib.util
import io
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend, SentencePieceExtractor

KINDS = (
    "bytelevel", "qwen", "merging", "llama3", "sp-bpe", "sp-bpe-slow", "sp-nodummy", "unigram", "t5", "wordpiece",
    "byt5",
)  # fmt: skip
LOSSY_KINDS = ("t5", "wordpiece")  # decode(encode(text)) != text for ordinary text

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

_CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello there! How are you doing today? I'm fine, thanks.",
    "user\nassistant\nsystem\ntool\nYou are a helpful assistant.\n\nWhat is the weather in Paris? It is 21 degrees.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n\tprint(i, add(i, 2))\n",
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n<think>\nLet me think.\n</think>\n\n',
    "héllo wörld — 12345 + 67890 = 80235; привет мир; مرحبا; こんにちは; 2024-06-01",
    "The answer is 4. The answer is four. Please say it again, and say it slowly.\n1. one\n2. two\n3. three\n",
] * 8

_GPT2_TOKENS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@functools.cache
def _bytelevel_json(pattern: str | None) -> str:
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
def _sentencepiece_file() -> str:
    path = Path(tempfile.mkdtemp(prefix="testkit-")) / "tokenizer.model"
    path.write_bytes(_sentencepiece_model())
    return str(path)


@functools.cache
def _sentencepiece_json(dummy_prefix: bool) -> str:
    vocab, _, merges = SentencePieceExtractor(_sentencepiece_file()).extract()
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
def _unigram_json(keep_whitespace: bool) -> str:
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
def _wordpiece_json() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


class SlowSentencePieceTokenizer(SentencePieceBackend):
    """Llama 2's slow tokenizer, as transformers 4 had it: SentencePiece does the work, Python adds BOS and EOS.

    What "slow" means in transformers 5 is the `PythonBackend` family: no `tokenizers` object, no offsets.
    """

    def __init__(self, vocab_file: str, add_bos_token: bool = True, add_eos_token: bool = False, **kwargs: Any) -> None:
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        super().__init__(vocab_file=vocab_file, add_bos_token=add_bos_token, add_eos_token=add_eos_token, **kwargs)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        before = [self.bos_token_id] if self.add_bos_token and self.bos_token_id is not None else []
        after = [self.eos_token_id] if self.add_eos_token and self.eos_token_id is not None else []
        return before + list(token_ids_0) + list(token_ids_1 or []) + after

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        # A piece list is decoded by SentencePiece, which joins the bytes; added tokens are kept as they are.
        text, run = "", []
        for token in [*tokens, None]:
            if token is not None and token not in self.added_tokens_encoder:
                run.append(token)
                continue
            # SentencePiece drops the `▁` that opens a text: right for the first piece, wrong after an added token.
            text += (" " if text and run and run[0].startswith("▁") else "") + self.sp_model.decode(run)
            text, run = text + (token or ""), []
        return text


def _post_processor(
    tokenizer: Tokenizer, bos: str | None, eos: str | None, add_bos: bool, add_eos: bool
) -> processors.PostProcessor | None:
    before = [bos] if add_bos and bos else []
    after = [eos] if add_eos and eos else []
    if not before and not after:
        return None
    ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(before + after)]
    return processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)


_RAW = {
    "bytelevel": lambda: _bytelevel_json(_GPT2_TOKENS),
    "qwen": lambda: _bytelevel_json(_QWEN),
    "merging": lambda: _bytelevel_json(None),
    "llama3": lambda: _bytelevel_json(_LLAMA3),
    "sp-bpe": lambda: _sentencepiece_json(True),
    "sp-nodummy": lambda: _sentencepiece_json(False),
    "unigram": lambda: _unigram_json(True),
    "t5": lambda: _unigram_json(False),
    "wordpiece": _wordpiece_json,
}
# kind -> (bos, eos, adds bos, adds eos), as the model it resembles has them
_DEFAULTS: dict[str, tuple[str | None, str, bool, bool]] = {
    "bytelevel": ("<|endoftext|>", "<|endoftext|>", False, False),
    "qwen": (None, "<|im_end|>", False, False),
    "merging": (None, "<|im_end|>", False, False),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", True, False),
    "sp-bpe": ("<s>", "</s>", True, False),
    "sp-bpe-slow": ("<s>", "</s>", True, False),
    "sp-nodummy": ("<bos>", "<eos>", True, False),
    "unigram": (None, "</s>", False, False),
    "t5": (None, "</s>", False, True),
    "wordpiece": ("[CLS]", "[SEP]", True, True),
    "byt5": (None, "</s>", False, True),
}
_UNSET: Any = object()


def build_tokenizer(
    kind: str,
    *,
    chat_template: str | None = CHATML,
    special_tokens: Sequence[str] = CHATML_TOKENS,
    added_tokens: Sequence[str] = (),
    bos: str | None = _UNSET,
    eos: str | None = _UNSET,
    pad: str | None = "<|pad|>",
    add_bos: bool = _UNSET,
    add_eos: bool = _UNSET,
    normalizer: Any = None,
) -> Any:
    """A fresh tokenizer of `kind` (the caller may change it freely).

    Args:
        chat_template: None for a tokenizer without one.
        special_tokens: added as special tokens, never split; `added_tokens` likewise, not special (Qwen's `<think>`).
        bos, eos: the token strings, None for none; left out, those of the model that `kind` resembles.
        pad: a token string, "eos" for pad == eos, None for none.
        add_bos, add_eos: whether `tokenizer(text)` puts them there.
        normalizer: a `tokenizers` normalizer for fast kinds, for example NFC.
    """
    if kind not in _DEFAULTS:
        raise ValueError(f"unknown kind {kind!r}; one of {KINDS}")
    default = _DEFAULTS[kind]
    bos, eos = (default[0] if bos is _UNSET else bos), (default[1] if eos is _UNSET else eos)
    add_bos, add_eos = (default[2] if add_bos is _UNSET else add_bos), (default[3] if add_eos is _UNSET else add_eos)
    names: dict[str, Any] = {"bos_token": bos, "eos_token": eos, "pad_token": eos if pad == "eos" else pad}
    names = {key: value for key, value in names.items() if value is not None}
    special = list(dict.fromkeys([*names.values(), *special_tokens]))
    if kind == "byt5":
        tokenizer = ByT5Tokenizer(extra_ids=0, **{"eos_token": eos or "</s>", **names})
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special], special_tokens=True)
    elif kind == "sp-bpe-slow":
        # legacy=True: transformers' other path needs the protobuf runtime that sentencepiece was generated with.
        tokenizer = SlowSentencePieceTokenizer(
            _sentencepiece_file(), add_bos_token=add_bos, add_eos_token=add_eos, unk_token="<unk>", legacy=True, **names
        )
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special], special_tokens=True)
    else:
        raw = Tokenizer.from_str(_RAW[kind]())
        if normalizer is not None:
            raw.normalizer = normalizer
        raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        processor = _post_processor(raw, bos, eos, add_bos, add_eos)
        if processor is not None:
            raw.post_processor = processor
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **names)
    if added_tokens:
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in added_tokens])
    tokenizer.chat_template = chat_template
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# One tokenizer per chat template of TRL
# ---------------------------------------------------------------------------------------------------------------------

# prefix of the template's name -> kind, bos, eos, the ends of turn that the generation config lists besides eos, as
# the checkpoints have them. The longest matching prefix counts.
_TEMPLATES: dict[str, tuple[str, str | None, str, tuple[str, ...]]] = {
    "cohere": ("bytelevel", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", ()),
    "deepseek": ("bytelevel", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ()),
    "diffusion_gemma": ("sp-nodummy", "<bos>", "<eos>", ("<turn|>", "<|tool_response>")),
    "gemma": ("sp-nodummy", "<bos>", "<eos>", ("<end_of_turn>",)),
    "gemma4": ("sp-nodummy", "<bos>", "<eos>", ("<turn|>", "<|tool_response>")),
    "glm4moe": ("qwen", None, "<|endoftext|>", ("<|user|>", "<|observation|>")),
    "gptoss": ("llama3", "<|startoftext|>", "<|return|>", ("<|call|>", "<|endoftext|>")),
    "idefics3": ("llama3", "<|begin_of_text|>", "<|end_of_text|>", ("<end_of_utterance>",)),
    "lfm2": ("llama3", "<|startoftext|>", "<|im_end|>", ()),
    "llama3": ("llama3", "<|begin_of_text|>", "<|eot_id|>", ("<|end_of_text|>", "<|eom_id|>")),
    "llava_next": ("sp-bpe", "<s>", "</s>", ()),
    "muse_glimmer": ("llama3", "<|begin_of_text|>", "<|eot|>", ("<|eom|>",)),
    "nemotron": ("qwen", "<s>", "<|im_end|>", ()),
    "phi3": ("sp-bpe", "<s>", "<|endoftext|>", ("<|end|>",)),
    "qwen": ("qwen", None, "<|im_end|>", ("<|endoftext|>",)),
    "smolvlm": ("bytelevel", "<|im_start|>", "<end_of_utterance>", ()),
}
_SPECIAL = re.compile(
    r"<\|[A-Za-z_\"]{1,40}\|?>|<[a-z_]{1,40}\|>|<｜[^｜\n]{1,40}｜>|<(?:start|end)_of_[a-z]+>|<image>|\[gMASK\]|<sop>"
)
# Tokens of their own, but ordinary text to `skip_special_tokens`, as in the Qwen, GLM and Nemotron checkpoints.
_ADDED = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")


def template_dir() -> Path:
    """TRL's folder of chat templates, found without importing TRL."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the template matrix needs trl, which is not installed: pip install 'sft-plugins[trl]'")
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def template_names() -> list[str]:
    """TRL's templates that have their row on the page."""
    return sorted(_installed_templates() & _templates_of_the_page())


def new_templates() -> list[str]:
    """Those that a newer TRL brought since: `python tests/masking/test_template_matrix.py --write …` examines them."""
    return sorted(_installed_templates() - _templates_of_the_page())


def _installed_templates() -> set[str]:
    return {path.stem for path in template_dir().glob("*.jinja")}


@functools.cache
def _templates_of_the_page() -> frozenset[str]:
    page = Path(__file__).parents[3] / "docs" / "template-matrix.md"
    table = page.read_text(encoding="utf-8").partition("\n## ")[0]
    return frozenset(re.findall(r"^\| (\w+) \| \d", table, flags=re.M))


def template_text(name: str) -> str:
    path = template_dir() / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"the installed TRL has no template {name}")
    return path.read_text(encoding="utf-8")


def template_facts(name: str) -> tuple[str, str | None, str, tuple[str, ...]]:
    """(kind, bos, eos, further ends of turn) of the checkpoints that carry this template."""
    prefixes = [prefix for prefix in _TEMPLATES if name.startswith(prefix)]
    if not prefixes:
        raise KeyError(f"no hand-written facts for chat template {name!r}: add it to testkit.tokenizers._TEMPLATES")
    return _TEMPLATES[max(prefixes, key=len)]


@functools.cache
def _tokenizer_for_template(name: str) -> Any:
    kind, bos, eos, ends = template_facts(name)
    text = template_text(name)
    special = [*ends, *sorted(set(_SPECIAL.findall(text)))]
    added = sorted(set(_ADDED.findall(text)))
    pad = "<|pad|>"
    return build_tokenizer(
        kind, chat_template=text, special_tokens=special, added_tokens=added, bos=bos, eos=eos, pad=pad,
        add_bos=bos is not None and kind in ("llama3", "sp-bpe", "sp-nodummy"), add_eos=False,
    )  # fmt: skip


def tokenizer_for_template(name: str) -> Any:
    """A fresh tokenizer for TRL's template `name`, EOS and generation config as in the checkpoints that ship it."""
    tokenizer = copy.deepcopy(_tokenizer_for_template(name))
    tokenizer.name_or_path = _checkpoint(name)
    return tokenizer


@functools.cache
def _checkpoint(name: str) -> str:
    """A folder with the generation config of the checkpoints that carry template `name`."""
    folder = tempfile.mkdtemp(prefix="testkit-")
    GenerationConfig(eos_token_id=sorted(stop_ids_for_template(name))).save_pretrained(folder)
    return folder


def stop_ids_for_template(name: str) -> set[int]:
    """Ids that end generation: EOS and the ends of turn of the generation config."""
    tokenizer = _tokenizer_for_template(name)
    _, _, eos, ends = template_facts(name)
    return {tokenizer.convert_tokens_to_ids(token) for token in (eos, *ends)}


def has_generation_markers(name: str) -> bool:
    return bool(re.search(r"{%-?\s*generation\s*-?%}", template_text(name)))


def dump(tokenizer: Any) -> str:
    """Everything observable of a tokenizer, to show that nobody changed it."""
    state: dict[str, Any] = {
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "chat_template": tokenizer.chat_template,
        "length": len(tokenizer),
        "model_max_length": tokenizer.model_max_length,
        "added": sorted((index, str(token)) for index, token in tokenizer.added_tokens_decoder.items()),
    }
    if tokenizer.is_fast:
        state["backend"] = tokenizer.backend_tokenizer.to_str()
    return json.dumps(state, sort_keys=True)
