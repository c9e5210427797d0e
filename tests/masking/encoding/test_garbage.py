"""The search for cyclic garbage pauses while a batch is encoded, and is as it was afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from sft_plugins.masking import PromptMasker
from sft_plugins.masking import masker as module
from testkit.tokenizers import build_tokenizer

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("on", [False, True])
def test_the_search_is_off_within_and_afterwards_as_it_was(
    on: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    masker = PromptMasker(build_tokenizer("qwen"))
    within = []

    def turn_ids(*_: Any) -> Any:
        within.append(gc.isenabled())
        if fails:
            raise MemoryError
        return own(*_)

    own = module.turn_ids
    monkeypatch.setattr(module, "turn_ids", turn_ids)
    if not on:
        gc.disable()
    if fails:
        with pytest.raises(MemoryError):
            masker.encode(ROW)
    else:
        assert len(masker.encode(ROW)) == 1
    assert within == [False]
    assert gc.isenabled() == on
