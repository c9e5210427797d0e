"""What a forward may be given: exact, ordinary with proof, or refused. Each input is set against its documents run alone.

layout   aaabb..      documents of 3 and 2 tokens, two tokens of padding; rows are parted by a slash
outcome  exact        packed, and every document gets what it gets alone
         ordinary     the model's own forward; one document per row, which gets what it gets alone
         <code>       refused with it
"""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from sft_plugins.errors import ContaminationError, SFTPluginsError
from sft_plugins.packing import isolate
from sft_plugins.packing.isolation.reading import take_boundaries
from testkit.tiny_models import WINDOW, build

PADDING = "."
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What this transformers calls it: `cache` since 5.24, which takes the older name too."""


def grid(text: str, *, start: int = 0) -> torch.Tensor:
    """ "0120/0101" → [[0, 1, 2, 0], [0, 1, 0, 1]]."""
    return torch.tensor([[int(c) + start for c in row] for row in text.split("/")])


def ends(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def pairs(layout: str, *, additive: bool = True) -> torch.Tensor:
    """The 4-D mask of a layout: each token sees the earlier ones of its own letter."""
    (row,) = layout.split("/")
    sees = torch.tensor([[row[q] == row[k] != PADDING and k <= q for k in range(len(row))] for q in range(len(row))])
    if not additive:
        return sees[None, None]
    return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    model = build("llama").model
    isolate(model)
    return model


def ids_of(layout: str) -> torch.Tensor:
    rows = layout.split("/")
    generator = torch.Generator().manual_seed(len(layout))
    return torch.randint(4, 90, (len(rows), len(rows[0])), generator=generator)


def documents_of(layout: str) -> list[tuple[int, list[int]]]:
    """Row and tokens of each document; a letter that comes again behind padding or another is another document, unless
    padding stands inside it."""
    found: list[tuple[int, list[int]]] = []
    for row, text in enumerate(layout.split("/")):
        for letter in dict.fromkeys(text.replace(PADDING, "")):
            found.append((row, [i for i, c in enumerate(text) if c == letter]))
    return found


def delta(model: nn.Module, layout: str, ids: torch.Tensor, logits: torch.Tensor) -> float:
    """Largest difference from the documents run alone, relative to the largest logit."""
    worst = scale = 0.0
    for row, tokens in documents_of(layout):
        alone = model(input_ids=ids[row, tokens][None], use_cache=False).logits[0]
        worst, scale = (
            max(worst, float((logits[row, tokens] - alone).abs().max())),
            max(scale, float(alone.abs().max())),
        )
    return worst / scale


@torch.no_grad()
def outcome_of(model: nn.Module, layout: str, given: dict[str, Any]) -> tuple[str, float]:
    """What became of a forward, and how far its documents are from themselves alone."""
    ids = ids_of(layout)
    given = {key: value(model, ids) if callable(value) else value for key, value in given.items()}
    inputs = {} if "inputs_embeds" in given else {"input_ids": ids}
    try:
        logits = model(**inputs, **given).logits
    except SFTPluginsError as error:
        return error.code if error.remedy else "no remedy", 0.0
    packed = take_boundaries({**given, "input_ids": ids}, rows=ids.shape[0], tokens=ids.shape[1]) is not None
    return "exact" if packed else "ordinary", delta(model, layout, ids, logits)


def embedded(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.get_input_embeddings()(ids)


def filled(model: nn.Module, ids: torch.Tensor) -> Any:
    return model(input_ids=ids[:, :2], use_cache=True)[CACHE]


PADDED: list[tuple[str, dict[str, Any], str]] = [
    ("aaabb..", {"position_ids": grid("0120100"), "attention_mask": grid("1111100")}, "exact"),
    ("aaabb..", {"position_ids": grid("0120100"), "attention_mask": grid("1111100").bool()}, "exact"),
    ("aaabb..", {"position_ids": grid("0120100"), "attention_mask": grid("1112200")}, "exact"),
    ("aaabb..", {"position_ids": grid("0120111"), "attention_mask": grid("1111100")}, "exact"),
    ("aaabb..", {"position_ids": grid("0120123"), "attention_mask": grid("1111100")}, "exact"),
    ("aaabb..", {"position_ids": grid("0120100")}, "exact"),
    ("aaabb..", {"attention_mask": grid("1112200")}, "exact"),
    ("aaabb..", {"cu_seq_lens_q": ends(3, 4), "attention_mask": grid("1111100")}, "exact"),
    ("aaabb..", {"cu_seq_lens_q": ends(3, 2, 2), "attention_mask": grid("1111100")}, "exact"),
    ("aaabb..", {"seq_idx": grid("0001111"), "attention_mask": grid("1112200")}, "exact"),
    ("..aaabb", {"position_ids": grid("0001201"), "attention_mask": grid("0011111")}, "exact"),
    ("..aaabb", {"cu_seq_lens_q": ends(5, 2), "attention_mask": grid("0011111")}, "exact"),
    ("aaa..bb", {"position_ids": grid("0120001"), "attention_mask": grid("1110011")}, "exact"),
    ("ab......", {"position_ids": grid("00000000"), "attention_mask": grid("11000000")}, "exact"),
    (
        "aaabbb/aabb..",
        {"position_ids": grid("012012/010100"), "attention_mask": grid("111111/111100")},
        "exact",
    ),
    ("aaabbb/aaaa..", {"position_ids": grid("012012/012300"), "attention_mask": grid("111111/111100")}, "exact"),
    ("aaabbb/aabb..", {"attention_mask": grid("111222/112200")}, "exact"),
    ("aaabb..", {"position_ids": grid("0120111")}, "boundaries"),  # padding, or documents that begin at 1?
    ("aa.abb.", {"position_ids": grid("0123010"), "attention_mask": grid("1101110")}, "mask_with_boundaries"),
    ("aa.abb.", {"position_ids": grid("0102010"), "attention_mask": grid("1101110")}, "mask_with_boundaries"),
    (".......", {"cu_seq_lens_q": ends(3, 4), "attention_mask": grid("0000000")}, "bad_mask"),
    ("aaabb", {"position_ids": grid("01201"), "attention_mask": grid("00000").float()}, "bad_mask"),
]

CONTRADICTING: list[tuple[str, dict[str, Any], str]] = [
    ("aaabb/aaabb", {"position_ids": grid("01201")}, "exact"),
    ("aaabb/aaabb", {"position_ids": grid("01201")[0]}, "exact"),
    ("aaabb", {"position_ids": grid("01201")[0]}, "exact"),
    ("aaabb", {"position_ids": grid("01201/01234")}, "boundaries"),
    ("aaabb", {"position_ids": grid("0120")}, "boundaries"),
    ("aaabb", {"position_ids": grid("01201").bool()}, "boundaries"),
    ("aaabb", {"position_ids": grid("01201").tolist()}, "boundaries"),
    ("aaabb", {"position_ids": grid("01278")}, "boundaries"),  # PoSE, or two documents?
    ("aaabb", {"position_ids": grid("01256"), "attention_mask": grid("11111")}, "boundaries"),
    ("aaabb", {"position_ids": grid("23412")}, "boundaries"),
    ("aaabb", {"position_ids": grid("01201") / 2}, "boundaries"),
    ("aaabb", {"seq_idx": grid("00111"), "cu_seq_lens_q": ends(3, 2)}, "boundaries"),
    ("aaabb", {"seq_idx": grid("00111"), "position_ids": grid("01201")}, "boundaries"),
    ("aaabb", {"seq_idx": grid("00011"), "position_ids": grid("01234")}, "boundaries"),
    ("aaabb", {"cu_seq_lens_q": ends(5), "position_ids": grid("01201")}, "boundaries"),
    ("aaabb", {"cu_seq_lens_q": ends(3, 2), "cu_seq_lens_k": ends(2, 3)}, "boundaries"),
    ("aaabb", {"attention_mask": grid("11122"), "position_ids": grid("01234")}, "boundaries"),
    ("aaabb", {"attention_mask": grid("11222"), "position_ids": grid("01201")}, "boundaries"),
    ("aaabb", {"attention_mask": grid("11222"), "cu_seq_lens_q": ends(3, 2)}, "boundaries"),
    ("aaabb", {"max_length_q": 3, "max_length_k": 3}, "boundaries"),
    ("aaabb", {"max_length_q": 2, "position_ids": grid("01201")}, "boundaries"),
    ("aaabb", {"max_length_q": "three", "position_ids": grid("01201")}, "boundaries"),
    ("aaabb", {"cu_seqlens": ends(3, 2)}, "boundaries"),
    ("aaabb", {"seq_lengths": torch.tensor([[3, 2]])}, "boundaries"),
    ("aaabb", {"attention_mask": pairs("aaabb"), "position_ids": grid("01201")}, "block_mask"),
    ("aaabb", {"attention_mask": pairs("aaaaa"), "position_ids": grid("01201")}, "mask_with_boundaries"),
    ("aaabb", {"attention_mask": pairs("aaaaa"), "cu_seq_lens_q": ends(3, 2)}, "mask_with_boundaries"),
    ("aaabb", {"attention_mask": pairs("aaabb")}, "block_mask"),
    ("aaabb", {"attention_mask": {"full_attention": pairs("aaabb", additive=False)}}, "block_mask"),
    ("aaabb", {"attention_mask": object()}, "bad_mask"),
    ("aaabb", {"attention_mask": -grid("00011")}, "bad_mask"),
    ("aaabb", {"attention_mask": grid("11111") / 2}, "bad_mask"),
    ("aaabb", {"attention_mask": grid("1111")}, "bad_mask"),
    ("aaabb", {"attention_mask": grid("11111")[0]}, "bad_mask"),
    ("aaabb", {"position_ids": grid("01201"), "past_key_values": filled}, "cache_with_boundaries"),
    ("aaabb", {"position_ids": grid("01201"), CACHE: filled}, "cache_with_boundaries"),
    ("aaabb", {"position_ids": grid("01201"), CACHE: lambda *_: DynamicCache()}, "cache_with_boundaries"),
    ("aaabb", {"cu_seq_lens_q": ends(3, 2), "past_key_values": lambda *_: DynamicCache()}, "cache_with_boundaries"),
]

EVERY: list[tuple[str, dict[str, Any], str]] = [
    ("aaaaa", {}, "ordinary"),
    ("aaaaa", {"use_cache": False}, "ordinary"),
    ("aaaaa", {"attention_mask": grid("11111")}, "ordinary"),
    ("aaaaa", {"attention_mask": grid("11111").bool(), "seq_idx": None}, "ordinary"),
    ("aaaaa", {"attention_mask": grid("11111").float(), "position_ids": grid("01234")}, "ordinary"),
    ("aaaaa", {"position_ids": grid("01234")}, "ordinary"),
    ("aaaaa", {"position_ids": grid("34567")}, "ordinary"),
    ("aaaaa", {"position_ids": grid("01234"), "past_key_values": lambda *_: DynamicCache()}, "ordinary"),
    ("aaaaa/aaaaa", {"position_ids": grid("01234")}, "ordinary"),
    ("aaaaa/aaaaa", {"position_ids": grid("01234/34567")}, "ordinary"),
    ("aaa../aaaaa", {"attention_mask": grid("11100/11111")}, "ordinary"),
    ("aaa../aaaaa", {"attention_mask": grid("11100/11111"), "position_ids": grid("01200/01234")}, "ordinary"),
    ("aaa../aaaaa", {"attention_mask": grid("11100/11111").bool(), "position_ids": grid("01211/01234")}, "ordinary"),
    ("..aaa/aaaaa", {"attention_mask": grid("00111/11111")}, "ordinary"),
    ("..aaa/aaaaa", {"attention_mask": grid("00111/11111"), "position_ids": grid("11012/01234")}, "ordinary"),
    ("..aaa/aaaaa", {"attention_mask": grid("00111/11111"), "position_ids": grid("00012/01234")}, "ordinary"),
    ("aa.aa", {"attention_mask": grid("11011"), "position_ids": grid("01023")}, "ordinary"),
    ("aaaaa", {"attention_mask": pairs("aaaaa")}, "ordinary"),
    ("aaaaa", {"attention_mask": pairs("aaaaa", additive=False), "position_ids": grid("01234")}, "ordinary"),
    ("aaaaa", {"inputs_embeds": embedded}, "ordinary"),
    ("aaabb", {"inputs_embeds": embedded, "position_ids": grid("01201")}, "exact"),
    ("aaabb", {"position_ids": grid("01201")}, "exact"),
    ("aaabb", {"position_ids": grid("01201", start=7)}, "exact"),
    ("abc", {"position_ids": grid("000")}, "exact"),
    ("aaabb", {"position_ids": grid("01201"), "attention_mask": grid("11111")}, "exact"),
    ("aaabb", {"position_ids": grid("01201"), "attention_mask": grid("11122")}, "exact"),
    ("aaabb", {"attention_mask": grid("11122")}, "exact"),
    ("aaabb", {"attention_mask": grid("22211").float()}, "exact"),
    ("aaabb", {"cu_seq_lens_q": ends(3, 2), "attention_mask": grid("11111")}, "exact"),
    ("aaabb", {"cu_seq_lens_k": [0, 3, 5], "max_length_q": torch.tensor(9)}, "exact"),
    ("aaabb", {"seq_idx": grid("11133"), "attention_mask": grid("11111").bool()}, "exact"),
    ("aaaaa", {"cu_seq_lens_q": ends(5), "position_ids": grid("01234")}, "exact"),
    ("aaaaa", {"attention_mask": grid("22222")}, "exact"),
    ("aaabb/aaaaa", {"position_ids": grid("01201/01234")}, "exact"),
    ("aaabb/aabbb", {"cu_seq_lens_q": ends(3, 2, 2, 3), "attention_mask": grid("11111/11111")}, "exact"),
]


def check(model: nn.Module, layout: str, given: dict[str, Any], expected: str) -> None:
    outcome, difference = outcome_of(model, layout, given)
    assert outcome == expected
    assert difference <= 1e-5


@pytest.mark.parametrize(("layout", "given", "expected"), PADDED)
def test_p16_padding_does_not_hide_documents(
    llama: nn.Module, layout: str, given: dict[str, Any], expected: str
) -> None:
    """P16: positions that fall between two visible tokens are nothing but packing, whatever the mask hides around them."""
    check(llama, layout, given, expected)


@pytest.mark.parametrize(("layout", "given", "expected"), CONTRADICTING)
def test_p17_what_contradicts_itself_is_refused(
    llama: nn.Module, layout: str, given: dict[str, Any], expected: str
) -> None:
    """P17: keys, positions and masks say the same of documents, or the forward stops."""
    check(llama, layout, given, expected)


@pytest.mark.parametrize(("layout", "given", "expected"), EVERY)
def test_every_other_input_is_exact_or_ordinary(
    llama: nn.Module, layout: str, given: dict[str, Any], expected: str
) -> None:
    check(llama, layout, given, expected)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_p17_a_mask_of_pairs_does_not_stand_in_for_documents(name: str) -> None:
    """P17: layers with a window would see as far as the mask goes."""
    model = build(name).model
    isolate(model)
    for given in ({"position_ids": grid("01201")}, {}):
        assert outcome_of(model, "aaabb", {"attention_mask": pairs("aaabb"), **given})[0] == "block_mask"


@pytest.mark.parametrize("axes", [3, 4])
def test_p17_positions_of_several_axes_are_read(axes: int) -> None:
    """P17: one position per axis of an image; where time falls back, another document begins."""
    model = build("cohere_compass_text" if axes == 3 else "qwen3_5_text").model
    isolate(model)

    def given(text: str) -> dict[str, Any]:
        return {"position_ids": grid(text)[None].expand(axes, -1, -1)}

    for layout, positions, expected in (("aaaaa", "01234", "ordinary"), ("aaabb", "01201", "exact")):
        outcome, difference = outcome_of(model, layout, given(positions))
        assert (outcome, difference <= 1e-5) == (expected, True)
    outcome, difference = outcome_of(model, "aaabb..", {**given("0120100"), "attention_mask": grid("1111100")})
    assert (outcome, difference <= 1e-5) == ("exact", True)
    image = torch.stack([grid("0122225"), grid("0122335"), grid("0123235")])  # text, two lines of two patches, text
    assert take_boundaries({"position_ids": image}, rows=1, tokens=7) is None


def test_a_row_that_goes_on_in_a_cache_is_ordinary(llama: nn.Module) -> None:
    """Chunks of a prompt, then single tokens, each with the positions and the wider mask that generation gives them."""
    ids = ids_of("aaaaaaa/aaaaaaa")
    with torch.no_grad():
        whole, cache, parts = llama(input_ids=ids).logits, None, []
        for begin, end in ((0, 3), (3, 6), (6, 7)):
            positions = torch.arange(begin, end).expand(2, -1)
            mask = torch.ones(2, end, dtype=torch.long)
            out = llama(input_ids=ids[:, begin:end], position_ids=positions, attention_mask=mask, **{CACHE: cache})
            cache = out[CACHE]
            parts.append(out.logits)
    assert float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_masks_that_a_model_makes_for_its_text_model_are_its_own(name: str) -> None:
    """Gemma 3 wraps a text model and hands it the masks of its windows: in an ordinary row longer than one, no packing."""
    tiny = build(name)
    ids = torch.arange(4, 4 + 3 * WINDOW)[None]
    expected = tiny.model(input_ids=ids, use_cache=False).logits
    isolate(tiny.model)
    assert torch.equal(tiny.model(input_ids=ids, use_cache=False).logits, expected)
    padded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(tiny.model(**padded, use_cache=False).logits, expected)
    windowed = torch.ones(1, 1, 21, 21, dtype=torch.bool).tril().triu(-WINDOW)
    with pytest.raises(ContaminationError) as caught:
        tiny.model(input_ids=ids, attention_mask=windowed, use_cache=False)
    assert caught.value.code == "block_mask"


def test_the_number_of_a_document_of_one_token_is_read_too() -> None:
    """OPT counts positions from the mask: a number left in it would be taken for a place."""
    plain = build("opt").model
    ids = torch.tensor([[5], [6]])
    with torch.no_grad():
        alone = plain(input_ids=ids).logits
        isolate(model := copy.deepcopy(plain))
        packed = model(input_ids=ids, attention_mask=torch.tensor([[3], [1]])).logits
    assert float((packed - alone).abs().max() / alone.abs().max()) <= 1e-5
