"""Text → ids exactly as generation gets them, and the facts about a tokenizer that let pieces be joined without error.

Two facts are used, both established from the tokenizer at hand, never assumed:

* **Safe joint.** A fast tokenizer cuts text at its special tokens before anything else looks at it. So where the right-hand
  text begins with a special token that swallows nothing to its left, tok(left + right) = tok(left) + tok(right).
* **Pieces.** In byte-level and SentencePiece vocabularies every id stands for fixed bytes, so that a row's ids decode to the
  concatenation of their pieces. Comparing bytes is how a row's text is verified; other tokenizers are asked to decode.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from sft_plugins.errors import MaskingError
from sft_plugins.masking.encoding.fast import BatchEncoder
from sft_plugins.masking.encoding.pieces import Pieces, candidates

# Text put before a continuation so that the tokenizer takes it for the middle of a text, and cut off again.
_ANCHORS = ("\n", "。", ":", "a", "0")
# What `AutoTokenizer` gives for Mistral's models where mistral-common is installed, by its names in transformers 5 and 4.
_WITHOUT_TEMPLATE = frozenset({"MistralCommonBackend", "MistralCommonTokenizer"})
_PROBES = ("Zq 1x,\n  y", "a\tb Übung 日本 🙂")


class TextTokenizer:
    """Wraps a Hugging Face tokenizer, fast or slow, and mutates nothing of it."""

    def __init__(self, tokenizer: Any) -> None:
        require_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special: dict[str, int] = {
            **{token.content: index for index, token in added.items() if token.special},
            **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)),
        }
        self.special_ids = frozenset(self.special.values())
        self._special_pattern = _alternation(self.special)
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        self._safe = frozenset(_safe_joints(added)) if self._backend is not None else frozenset()
        # All added tokens, so that one that goes on where a safe one ends is seen for what it is.
        self._added_pattern = _alternation(token.content for token in added.values())
        direct = self._backend is not None and self._direct_equals_public()
        contents = [token.content for token in added.values()]
        self.batch = BatchEncoder(self._backend, self.size, contents) if direct else None
        self.pieces = _piece_table(self)
        self._short: dict[str, list[int]] = {}
        self._short_exact: dict[str, bool] = {}
        self._continues = self.pieces is not None and self.decodes_to(self.encode(["Zq"])[0], "Zq")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens added: what `apply_chat_template(tokenize=True)` does with its text."""
        if not texts:
            return []
        return self.batch(texts) if self.batch is not None and self.is_direct else self._public(texts)

    def expect(self, texts: list[str]) -> None:
        """Told of texts that `encode` is to be given, maybe in another thread: what they make worth building is built here."""
        if self.batch is not None and self.is_direct:
            self.batch.expect(texts)

    @property
    def is_direct(self) -> bool:
        """Whether the Rust backend encodes by itself, which changes nothing in it and needs no lock of Python's.

        Calls with padding or truncation leave those switched on in the backend; then only the public way is exact.
        """
        return self.batch is not None and self._backend.padding is None and self._backend.truncation is None

    def encode_short(self, text: str) -> list[int]:
        """`encode` of one recurring text (a generation prompt, say), remembered."""
        found = self._short.get(text)  # once: another thread may clear it between two looks
        if found is None:
            found = self.encode([text])[0]
            if len(self._short) > 4096:
                self._short.clear()
            self._short[text] = found
        return found

    def short_is_exact(self, text: str) -> bool:
        """Whether the ids of a recurring text stand for its very bytes, remembered."""
        found = self._short_exact.get(text)
        if found is None:
            found = self.decode_exactly([text], [self.encode_short(text)])
            if len(self._short_exact) > 4096:
                self._short_exact.clear()
            self._short_exact[text] = found
        return found

    def encode_prompt(self, text: str) -> list[int]:
        """`tokenizer(text)` as generation is given it: the special tokens it puts in front, BOS at most once, none behind."""
        bare = self.encode([text])[0]
        full = self.tokenizer(text, verbose=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if not bare:  # of an empty text only a BOS is left; an EOS stands behind it
            return [bos] if bos is not None and full[:1] == [bos] else []
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                front = full[:start]
                break
        else:  # the tokenizer treats the text itself differently when it adds special tokens
            return full
        if front and front[-1] == bare[0] == bos:
            front = front[:-1]
        return front + bare

    def encode_continuations(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that go on after a prompt. Decoding them gives the text back, with no space put in front.

        A tokenizer that marks the beginning of a text (SentencePiece's added space) is shown an anchor before it, whose
        ids are cut off again.
        """
        if self._continues:
            return self.encode(texts)
        plain = self.encode(texts)
        return [
            ids if self.goes_on(ids, text) else self._anchored(text, ids)
            for text, ids in zip(texts, plain, strict=True)
        ]

    def decodes_to(self, ids: Sequence[int], text: str) -> bool:
        """Whether `ids` stand for exactly `text`, up to the Unicode normalisation that the tokenizer itself applies."""
        got = self.decode(ids)
        return got == text or (
            not text.isascii() and got in (unicodedata.normalize(form, text) for form in ("NFC", "NFKC"))
        )

    def decode_exactly(self, texts: list[str], ids: list[list[int]]) -> bool:
        """Whether the ids of every text stand for its very bytes; one comparison for all of them."""
        if self.pieces is None:
            return False
        spelled = [text.encode() for text in texts]
        lengths = np.cumsum([len(one) for one in ids])
        flat = np.fromiter(chain.from_iterable(ids), np.int64)
        ends = np.concatenate(([0], np.cumsum(self.pieces.widths[flat])))[lengths]
        return bool(np.array_equal(ends, np.cumsum([len(one) for one in spelled]))) and (
            self.pieces.joined(flat) == b"".join(spelled)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included and nothing tidied. Invalid UTF-8 becomes U+FFFD."""
        if self.pieces is not None:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        # Decoders trim the beginning of a text, so what is asked about is put behind something known.
        lead = self.encode_short("a")
        return self._public_decode([*lead, *ids])[len(self._public_decode(lead)) :]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The pieces of `ids` joined; only where `pieces` is not None."""
        assert self.pieces is not None
        return self.pieces.joined(ids)

    def is_safe_joint(self, text: str) -> bool:
        """Whether tok(left + text) = tok(left) + tok(text) for every `left`."""
        match = self._added_pattern.match(text) if self._added_pattern else None
        return match is not None and match.group() in self._safe

    def safe_joints(self, text: str, start: int = 0) -> list[int]:
        """Where pieces of `text` begin that may be tokenised on their own, from `start` on.

        Where `start` itself is one, those before it are the same whatever comes after it, as no token crosses a safe one.
        """
        if self._added_pattern is None:
            return []
        return [match.start() for match in self._added_pattern.finditer(text, start) if match.group() in self._safe]

    def special_in(self, text: str) -> Iterator[str]:
        """The special tokens that `text` would be tokenised to, in order."""
        return (match.group() for match in self._special_pattern.finditer(text)) if self._special_pattern else iter(())

    def has_special(self, text: str) -> bool:
        """Whether `text` holds the text of any special token."""
        return self._special_pattern is not None and self._special_pattern.search(text) is not None

    def definition(self) -> str:
        """Everything that decides how this tokenizer tokenises, as text; what earlier calls left switched on excluded."""
        if self._backend is None:
            return json.dumps([self.tokenizer.get_vocab(), repr(self.tokenizer)], sort_keys=True)
        definition = self._backend.to_str()
        if self.batch is not None and self.is_direct:
            self.batch.written_out(definition)
        return definition[definition.index('"added_tokens"') :]  # after "version", "truncation" and "padding"

    def _anchored(self, text: str, plain: list[int]) -> list[int]:
        for anchor in _ANCHORS:
            front = self.encode_short(anchor)
            ids = self.encode([anchor + text])[0]
            if ids[: len(front)] == front and self.goes_on(ids[len(front) :], text):
                return ids[len(front) :]
        return plain  # the caller's coverage check says what is wrong with it

    def goes_on(self, ids: list[int], text: str) -> bool:
        """Whether `ids` give `text` up to their first special token. Slow tokenizers put a space behind those as well."""
        special = next((i for i, token in enumerate(ids) if token in self.special_ids), None)
        if special is None:
            return self.decodes_to(ids, text)
        return text.startswith(self.decode(ids[: special + 1]))

    def _public_decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _public(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _direct_equals_public(self) -> bool:
        """Whether the Rust backend alone does what the tokenizer's `__call__` does (a subclass may do more)."""
        if self._backend.padding is not None or self._backend.truncation is not None:
            return False
        texts = [*_PROBES, "".join(self.special), " ".join(self.special)]
        direct = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        return direct == self._public(texts)


def _alternation(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Pattern that finds any of `tokens`, the longest first, as tokenizers do."""
    ordered = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _safe_joints(added: dict[int, Any]) -> list[str]:
    """Special tokens that a text can be cut in front of. See `is_safe_joint`.

    Excluded: tokens that strip white space to their left or match whole words only, and tokens that another added token
    could overlap from the left (in "a<|x" + "|>b", say, were "a<|x|>" a token as well).
    """
    contents = [token.content for token in added.values()]
    safe = []
    for token in added.values():
        if not token.special or token.lstrip or token.single_word or token.normalized:
            continue
        own = token.content
        first = own[0]
        crossed = any(
            own.startswith(other[i:]) or other[i:].startswith(own)
            for other in contents
            for i in range(1, len(other))
            if other[i] == first
        )
        if not crossed:
            safe.append(own)
    return safe


def _piece_table(text: TextTokenizer) -> Pieces | None:
    """Bytes of every id, or None if this vocabulary has no fixed ones. Verified on text before it is trusted."""
    tokenizer = text.tokenizer
    tokens = _tokens(tokenizer, text.size)
    if {*map(type, tokens)} != {str}:
        return None
    added = {index: token.content for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    probes = dict(zip(_PROBES, text.encode([*_PROBES]), strict=True))
    for pieces in candidates(tokens, {index: content for index, content in added.items() if index < len(tokens)}):
        if all(_pieces_hold(pieces, ids, probe, text) for probe, ids in probes.items()):
            return pieces
    return None


def _tokens(tokenizer: Any, size: int) -> list[Any]:
    """`convert_ids_to_tokens` of every id; what transformers' own does for a fast tokenizer, without its search of each."""
    own = getattr(tokenizer.convert_ids_to_tokens, "__func__", None)
    if tokenizer.is_fast and own is PreTrainedTokenizerFast.convert_ids_to_tokens:
        return list(map(tokenizer.backend_tokenizer.id_to_token, range(size)))
    return tokenizer.convert_ids_to_tokens(list(range(size)))


def _pieces_hold(pieces: Pieces, ids: list[int], probe: str, text: TextTokenizer) -> bool:
    unknown = text.tokenizer.unk_token_id
    if unknown is not None and unknown in ids:  # the probe's characters are not in this vocabulary: it shows nothing
        return probe is not _PROBES[0]
    return pieces.joined(ids).decode("utf-8", "replace") in (probe, " " + probe)


def state_of(tokenizer: Any) -> tuple[Any, ...]:
    """What of a tokenizer its owner may set, to be compared: while it is the same, so is what was found out about it."""
    template = tokenizer.chat_template
    return (
        len(tokenizer),
        dict(getattr(tokenizer, "added_tokens_decoder", {})),
        tokenizer.special_tokens_map,
        dict(template) if isinstance(template, dict) else template,  # one for tools besides
    )


def require_tokenizer(tokenizer: Any) -> None:
    """Raises:
    MaskingError: `bad_schema` where something else was passed for a tokenizer (a processor, a name), or Mistral's own.
    """
    if any(kind.__name__ in _WITHOUT_TEMPLATE for kind in type(tokenizer).__mro__):
        raise MaskingError(
            f"{type(tokenizer).__name__} encodes conversations with mistral-common, without a chat template that could show "
            "what each turn is given and what it answers.",
            code="bad_schema",
            remedy="{load_tokenizer:Load `PreTrainedTokenizerFast.from_pretrained(…, fix_mistral_regex=True)` instead}: the "
            "same vocabulary with the checkpoint's chat template; where it has none, {a_chat_template:pass a `chat_template`}.",
        )
    if not (callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens") and hasattr(tokenizer, "is_fast")):
        raise MaskingError(
            f"expected a transformers tokenizer, got {type(tokenizer).__name__}.",
            code="bad_schema",
            remedy="Pass `processor.tokenizer`."
            if hasattr(tokenizer, "tokenizer")
            else "Use AutoTokenizer.from_pretrained(…).",
        )
