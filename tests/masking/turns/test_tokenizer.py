"""`TextTokenizer`: where texts may be cut, how they go on, and what ids stand for, each against the tokenizer itself."""

from __future__ import annotations

import functools
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator, check_masks
from sft_plugins.masking.turns.tokenizer import TextTokenizer, _tokens
from testkit import mask_oracle
from testkit.conversations import BY_NAME, TemplateKnobs, texts
from testkit.properties import quiet
from testkit.tokenizers import CHATML, KINDS, build_tokenizer

FAST = ("bytelevel", "qwen", "merging", "llama3", "sp-bpe", "sp-nodummy", "unigram", "t5", "wordpiece")
EXACT = ("bytelevel", "qwen", "merging", "llama3", "sp-bpe", "sp-nodummy", "sp-bpe-slow", "byt5")

# Names that overlap, contain and continue one another, with every flag that lets a token reach beyond itself.
TRICKY = [
    AddedToken("<a>", special=True, normalized=False),
    AddedToken("<b>", special=True, normalized=False, lstrip=True),
    AddedToken("<c>", special=True, normalized=False, rstrip=True),
    AddedToken("<d>", special=True, normalized=False, single_word=True),
    AddedToken("<n>", special=True, normalized=True),
    AddedToken("<a><b>", special=True, normalized=False),
    AddedToken("x<a", special=True, normalized=False),
    AddedToken(">>", special=False, normalized=False),
    AddedToken("<e>", special=True, normalized=False),
    AddedToken("<e>y", special=True, normalized=False, lstrip=True),
    AddedToken("<f>", special=True, normalized=False),
    AddedToken("<f>z", special=True, normalized=False, single_word=True),
]
PIECES = [
    "<a>",
    "<b>",
    "<c>",
    "<d>",
    "<n>",
    "<e>",
    "<f>",
    "x",
    "y",
    "z",
    "<",
    ">",
    " ",
    "\n",
    "  ",
    "é",
    "The",
    "42",
    "<|im_end|>",
]


@functools.cache
def plain(kind: str) -> TextTokenizer:
    return TextTokenizer(build_tokenizer(kind))


@functools.cache
def tricky(kind: str, number: int) -> TextTokenizer:
    """Some of the tricky tokens, drawn by number, in an order drawn by number."""
    tokenizer = build_tokenizer(kind)
    order = random.Random(number).sample(TRICKY, k=random.Random(number).randint(4, len(TRICKY)))
    tokenizer.add_tokens(order, special_tokens=True)
    return TextTokenizer(tokenizer)


def ids_of(text: TextTokenizer, value: str) -> list[int]:
    return list(text.tokenizer(value, add_special_tokens=False)["input_ids"])


messy = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)


@quiet(max_examples=400)
@given(kind=st.sampled_from(FAST), number=st.integers(0, 11), left=messy, right=messy)
def test_texts_may_be_cut_at_every_safe_joint(kind: str, number: int, left: str, right: str) -> None:
    text = tricky(kind, number)
    if text.is_safe_joint(right):
        assert ids_of(text, left + right) == ids_of(text, left) + ids_of(text, right)
    whole = left + right
    pieces = pairwise([0, *text.safe_joints(whole), len(whole)])
    assert ids_of(text, whole) == [token for start, end in pieces for token in ids_of(text, whole[start:end])]


@quiet(max_examples=150)
@given(kind=st.sampled_from(FAST), left=texts(), right=texts())
def test_ordinary_texts_may_be_cut_before_a_special_token(kind: str, left: str, right: str) -> None:
    text = plain(kind)
    right = "<|im_end|>" + right
    assert text.is_safe_joint(right)
    assert ids_of(text, left + right) == ids_of(text, left) + ids_of(text, right)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_vocabulary_are_those_that_the_tokenizer_gives(kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    tokenizer.add_tokens(["<filename>"])
    assert _tokens(tokenizer, len(tokenizer)) == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))


def test_a_tokenizer_with_tokens_of_its_own_is_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("bytelevel")

    class Own(type(tokenizer)):  # type: ignore[misc]
        def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
            return [f"own {number}" for number in ids]

    monkeypatch.setattr(tokenizer, "__class__", Own)
    assert _tokens(tokenizer, 2) == ["own 0", "own 1"]


def test_what_is_remembered_of_short_texts_is_bounded() -> None:
    text = TextTokenizer(build_tokenizer("bytelevel"))
    for number in range(4200):
        assert text.short_is_exact(str(number))
    assert 0 < len(text._short) <= 4097
    assert 0 < len(text._short_exact) <= 4097
    assert text.encode_short("7") == ids_of(text, "7")


def test_which_joints_are_safe() -> None:
    text = plain("qwen")
    assert text.is_safe_joint("<|im_start|>user")
    assert not text.is_safe_joint(" <|im_start|>")
    assert not text.is_safe_joint("user")
    assert not text.is_safe_joint("")
    assert text.safe_joints("a<|im_end|>\n<|im_start|>b") == [1, len("a<|im_end|>\n")]
    assert text.safe_joints("plain") == []
    assert not TextTokenizer(build_tokenizer("sp-bpe-slow")).is_safe_joint("<|im_start|>")  # slow: nothing is known


@pytest.mark.parametrize(
    ("tokens", "safe", "unsafe"),
    [
        ([AddedToken("<k>", special=True, lstrip=True, normalized=False)], [], ["<k>"]),
        ([AddedToken("<k>", special=True, single_word=True, normalized=False)], [], ["<k>"]),
        ([AddedToken("<k>", special=True, rstrip=True, normalized=False)], ["<k>", "<k> x"], []),
        ([AddedToken("<k>", special=True, normalized=False), AddedToken("x<k", special=True, normalized=False)], [], ["<k>"]),
        ([AddedToken("<k>", special=True, normalized=False), AddedToken("x<k>y", special=True, normalized=False)], [], ["<k>"]),
        ([AddedToken("<k>", special=True, normalized=False), AddedToken("<k>>", special=True, normalized=False)],
         ["<k>", "<k>>"], []),
        ([AddedToken("<k>", special=True, normalized=False), AddedToken("<k>y", special=True, normalized=False, lstrip=True)],
         ["<k>", "<k>x"], ["<k>y"]),
    ],
    ids=["lstrip", "single_word", "rstrip", "overlap", "inside", "longer", "longer_lstrip"],
)  # fmt: skip
def test_tokens_that_reach_to_their_left_are_no_safe_joint(
    tokens: list[AddedToken], safe: list[str], unsafe: list[str]
) -> None:
    tokenizer = build_tokenizer("qwen")
    tokenizer.add_tokens(tokens, special_tokens=True)
    text = TextTokenizer(tokenizer)
    assert [text.is_safe_joint(right) for right in safe + unsafe] == [True] * len(safe) + [False] * len(unsafe)
    for right in safe:
        for left in ("a ", "x", "<", " "):
            assert ids_of(text, left + right) == ids_of(text, left) + ids_of(text, right)
    # Guard: cut before the others, some text comes out otherwise.
    pairs = [(left, right + after) for right in unsafe for left in ("a ", "x") for after in ("", "y")]
    assert not pairs or any(ids_of(text, a + b) != ids_of(text, a) + ids_of(text, b) for a, b in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Continuations, prompts, pieces
# ---------------------------------------------------------------------------------------------------------------------


@quiet(max_examples=200)
@given(kind=st.sampled_from(EXACT), value=texts(min_words=1))
def test_continuations_decode_back(kind: str, value: str) -> None:
    text = plain(kind)
    (ids,) = text.encode_continuations([value])
    before = ids_of(text, "Question:")
    if text.goes_on(ids, value):
        assert mask_oracle.continuation(text.tokenizer, before, ids) == value
    else:  # only where the tokenizer itself cannot give the text back behind anything
        ways = mask_oracle.tokenisations(text.tokenizer, value)
        assert all(mask_oracle.continuation(text.tokenizer, before, one) != value for one in ways)


@pytest.mark.parametrize("kind", EXACT)
def test_plain_continuations_do_decode_back(kind: str) -> None:
    """Guard for the test above."""
    text = plain(kind)
    for value in ("four", " four", "\nfour", "Hello there!\n\nYes.", "日本 é"):
        (ids,) = text.encode_continuations([value])
        assert text.goes_on(ids, value)
        assert text.decode(ids) == value


@pytest.mark.parametrize("kind", [*FAST, "sp-bpe-slow", "byt5"])
def test_prompts_have_bos_at_most_once_and_no_eos_behind(kind: str) -> None:
    text = plain(kind)
    tokenizer = text.tokenizer
    bos = tokenizer.bos_token_id
    for prompt in ("Hello", "Hello there. ", (tokenizer.bos_token or "") + "Hello"):
        ids = text.encode_prompt(prompt)
        full = list(tokenizer(prompt)["input_ids"])
        assert ids[-1] != tokenizer.eos_token_id
        assert ids[-len(ids_of(text, prompt)) :] == ids_of(text, prompt)
        if bos is not None and bos in full:
            assert ids.count(bos) == 1
            assert ids[0] == bos
        elif bos is not None:
            assert bos not in ids


@pytest.mark.parametrize("kind", ["bytelevel", "qwen", "merging", "llama3", "sp-bpe", "sp-nodummy"])
def test_pieces_are_what_the_tokenizer_decodes(kind: str) -> None:
    text = plain(kind)
    assert text.pieces is not None
    assert len(text.pieces) == len(text.tokenizer)
    draw = random.Random(0)
    front = ids_of(text, "a")  # decoders trim the beginning of a text
    for _ in range(300):
        ids = [draw.randrange(text.size) for _ in range(draw.randint(1, 8))]
        expected = mask_oracle.continuation(text.tokenizer, front, ids)
        if "�" in (expected or "�") or text.tokenizer.unk_token_id in ids:
            continue  # bytes that are no text: decoders differ in how many marks they put there
        assert text.decode(ids) == expected
        assert text.pieces.widths[ids].sum() == len(text.decode_bytes(ids)) == len(expected.encode())
        assert text.pieces.joined(ids * 40) == b"".join(text.pieces[token] for token in ids * 40)


def test_a_vocabulary_with_a_hole_has_no_table_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("qwen")
    own = tokenizer.convert_ids_to_tokens
    monkeypatch.setattr(tokenizer, "convert_ids_to_tokens", lambda ids: [None if i == 9 else own(i) for i in ids])
    text = TextTokenizer(tokenizer)
    assert text.pieces is None
    assert text.decodes_to(ids_of(text, "Hello"), "Hello")


@pytest.mark.parametrize("kind", ["t5", "wordpiece"])
def test_vocabularies_that_lose_text_have_no_exact_rows(kind: str) -> None:
    text = plain(kind)
    assert not text.decodes_to(ids_of(text, "Two  Words\n"), "Two  Words\n")


# ---------------------------------------------------------------------------------------------------------------------
# Rows that depend on it
# ---------------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_normalises_unicode_is_accepted() -> None:
    tokenizer = build_tokenizer("qwen", normalizer=normalizers.NFC())
    decomposed = "e\u0301t\u00e9"
    messages = [{"role": "user", "content": decomposed}, {"role": "assistant", "content": decomposed + "!"}] * 2
    (made,) = PromptMasker(tokenizer).encode({"messages": messages})
    answers = [mask_oracle.decode(tokenizer, made.input_ids[a:b]) for a, b in mask_oracle.runs(made.labels)]
    assert answers == ["\u00e9t\u00e9!<|im_end|>"] * 2
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert made.input_ids[: len(prompt)] == prompt
    (pair,) = PromptMasker(tokenizer).encode({"prompt": decomposed, "response": decomposed})
    assert mask_oracle.decode(tokenizer, pair.input_ids).endswith("\u00e9t\u00e9<|im_end|>")


PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["sp-bpe", "qwen", "llama3"])
def test_rows_are_exact_where_special_tokens_swallow_the_white_space_behind_them(kind: str) -> None:
    """Phi-3's tokens have rstrip=True: the newline after `<|assistant|>` leaves no id, neither here nor at generation."""
    tokenizer = build_tokenizer(kind, chat_template=PHI3, special_tokens=(), eos="<|endoftext|>")
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_tokens(
        [AddedToken(name, special=True, normalized=False, rstrip=True) for name in names], special_tokens=True
    )
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    masker = PromptMasker(tokenizer)
    assert end in masker.stop_token_ids
    for name in ("one_turn", "many_turns", "system", "repeated_answer", "digits"):
        row = BY_NAME[name].for_tokenizer("")
        made = masker.encode(row)
        messages = row["messages"]
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        prompt = tokenizer.apply_chat_template(messages[:last], add_generation_prompt=True, return_dict=False)
        ids, labels = made[-1].input_ids, made[-1].labels
        start, stop = mask_oracle.runs(labels)[-1]
        assert ids[:start] == list(prompt)
        assert ids[stop - 1] == end
        assert mask_oracle.decode(tokenizer, ids[start:stop]).strip() == messages[last]["content"].strip() + "<|end|>"
        assert mask_oracle.structure(tokenizer, ids, labels) == []


def test_a_template_rendered_under_every_tricky_token_stays_exact() -> None:
    knobs = TemplateKnobs(header="<|im_start|>{role}: ")
    row = BY_NAME["many_turns"].for_tokenizer("")
    for number in range(12):
        tokenizer = tricky("qwen", number).tokenizer
        tokenizer.chat_template = knobs.jinja()
        masker = PromptMasker(tokenizer)
        stops = set(masker.stop_token_ids)
        assert mask_oracle.violations(tokenizer, row, masker.encode(row), stop_ids=stops) == []


def _refused_by_name(tokenizer: Any) -> None:
    for use in (PromptMasker, StrictPromptMaskingCollator, lambda found: check_masks([], found)):
        with pytest.raises(MaskingError, match="mistral-common, without a chat template") as caught:
            use(tokenizer)
        assert caught.value.code == "bad_schema"
        assert "PreTrainedTokenizerFast.from_pretrained(" in str(caught.value.remedy)


@pytest.mark.parametrize("name", ["MistralCommonBackend", "MistralCommonTokenizer"])
def test_m40_mistrals_own_backend_is_named_with_what_to_load(name: str) -> None:
    """M40: under either of its names, and as Axolotl's subclass of it."""
    backend = type(name, (), {"__call__": None, "convert_ids_to_tokens": None, "tokenizer": None})
    _refused_by_name(backend())
    _refused_by_name(type("HFMistralTokenizer", (backend,), {})())


def test_m40_what_the_error_says_to_load_masks_mistrals_own_vocabulary(tmp_path: Path) -> None:
    """M40: with mistral-common itself, whose backend `AutoTokenizer` gives for such a folder."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    vocabulary = json.loads(sorted(data.glob("tekken_*.json"))[0].read_text())
    vocabulary["vocab"] = vocabulary["vocab"][:1000]
    vocabulary["config"]["default_vocab_size"] = 1000 + vocabulary["config"]["default_num_special_tokens"]
    (tmp_path / "tekken.json").write_text(json.dumps(vocabulary))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    _refused_by_name(AutoTokenizer.from_pretrained(tmp_path))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path, fix_mistral_regex=True)
    end = tokenizer.convert_tokens_to_ids("</s>")
    (row,) = PromptMasker(tokenizer, chat_template=CHATML.replace("<|im_end|>", "</s>"), stop_token_ids=[end]).encode(
        {"messages": [{"role": "user", "content": "Bonjour ?"}, {"role": "assistant", "content": "Salut à toi."}]}
    )
    start, stop = mask_oracle.runs(row.labels)[0]
    assert mask_oracle.decode(tokenizer, row.input_ids[start:stop]) == "Salut à toi.</s>"
