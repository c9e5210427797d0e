"""An option that is not what it may be is refused in one wording: what was got, what was expected, what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from sft_plugins._options import one_of, whole_number, whole_number_or_none
from sft_plugins.errors import PackingError, SFTPluginsError
from sft_plugins.integrations import layout_of
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator
from sft_plugins.packing import BlockDiagonalPackingCollator, even_rows, pack_dataset, pack_stream
from testkit.tiny_models import build
from testkit.tokenizers import build_tokenizer
from testkit.watched_runs import watcher

ROWS = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]


def tokenizer() -> Any:
    return build_tokenizer("qwen")


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a word for the masker": (
        lambda _: PromptMasker(tokenizer(), thinking="never"), "thinking is 'never'; expected one of 'auto', 'default'",
    ),
    "a length for the masker": (
        lambda _: PromptMasker(tokenizer(), max_length=1), "max_length is 1; expected an integer from 2 on, or None",
    ),
    "a list for the masker": (
        lambda _: PromptMasker(tokenizer(), ignore_columns="text"),
        "ignore_columns is 'text'; expected a list of names of columns",
    ),
    "a multiple for padded rows": (
        lambda _: StrictPromptMaskingCollator(tokenizer(), pad_to_multiple_of=True),
        "pad_to_multiple_of is True; expected an integer from 1 on, or None",
    ),
    "a multiple for packed rows": (
        lambda _: BlockDiagonalPackingCollator(tokenizer(), model=build("llama").model, pad_to_multiple_of=0),
        "pad_to_multiple_of is 0; expected an integer from 1 on, or None",
    ),
    "a policy of packing": (
        lambda _: pack_dataset(Dataset.from_list(ROWS), 8, overflow="split"),
        "overflow is 'split'; expected one of 'raise', 'drop', 'truncate'",
    ),
    "a buffer": (
        lambda _: pack_stream(ROWS, 8, buffer_size=2.5), "buffer_size is 2.5; expected an integer from 1 on",
    ),
    "a multiple of rows": (
        lambda _: even_rows(Dataset.from_list(ROWS), multiple_of=0), "multiple_of is 0; expected an integer from 1 on",
    ),
    "a number for the watch": (
        lambda folder: watcher(folder, every_steps=0), "every_steps is 0; expected an integer from 1 on, or None",
    ),
    "a share for the watch": (
        lambda folder: watcher(folder, budget=3), "budget is 3; expected a share in (0, 1], or None",
    ),
    "a layout": (
        lambda _: layout_of("parchment", packed=False), "to is 'parchment'; expected one of 'trl', 'llamafactory', 'swift'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_every_component_refuses_an_option_in_the_same_words(name: str, tmp_path: Path) -> None:
    call, words = REFUSED[name]
    with pytest.raises(SFTPluginsError, match=re.escape(f"[bad_option] {words}")) as caught:
        call(tmp_path)
    assert caught.value.code == "bad_option"
    assert caught.value.remedy


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_of_every_kind_are_taken(value: Any) -> None:
    for number in (whole_number("n", value, PackingError, most=3), whole_number_or_none("n", value, PackingError)):
        assert (type(number), number) == (int, 3)


@pytest.mark.parametrize("value", [True, np.bool_(True), 3.0, "3", None, 0, 4])
def test_what_is_no_whole_number_in_range_is_refused(value: Any) -> None:
    with pytest.raises(PackingError, match="expected an integer from 1 to 3") as caught:
        whole_number("n", value, PackingError, most=3, code="bad_capacity")
    assert caught.value.code == "bad_capacity"
    assert whole_number_or_none("n", None, PackingError) is None


def test_a_value_that_is_no_text_is_no_word() -> None:
    one_of("n", "a", ("a", "b"), PackingError)
    for value in (["a"], None, "ab", ""):
        with pytest.raises(PackingError, match="expected one of 'a', 'b'"):
            one_of("n", value, ("a", "b"), PackingError)
