"""One tokenizer of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from testkit.tokenizers.files import (
    GPT2_TOKENS,
    LLAMA3,
    QWEN,
    bytelevel_json,
    sentencepiece_file,
    sentencepiece_json,
    unigram_json,
    wordpiece_json,
)

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
    "bytelevel": lambda: bytelevel_json(GPT2_TOKENS),
    "qwen": lambda: bytelevel_json(QWEN),
    "merging": lambda: bytelevel_json(None),
    "llama3": lambda: bytelevel_json(LLAMA3),
    "sp-bpe": lambda: sentencepiece_json(True),
    "sp-nodummy": lambda: sentencepiece_json(False),
    "unigram": lambda: unigram_json(True),
    "t5": lambda: unigram_json(False),
    "wordpiece": wordpiece_json,
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
            sentencepiece_file(), add_bos_token=add_bos, add_eos_token=add_eos, unk_token="<unk>", legacy=True, **names
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
