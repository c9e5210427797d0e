"""One row masked, and what became of it."""

from __future__ import annotations

from typing import Any

import pytest

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker
from testkit.mask_oracle import decode, runs


def encode_one(tokenizer: Any, row: dict[str, Any], **options: Any) -> Any:
    rows = PromptMasker(tokenizer, **options).encode(row)
    assert len(rows) == 1
    return rows[0]


def supervised_text(tokenizer: Any, row: Any) -> list[str]:
    return [decode(tokenizer, row.input_ids[a:b]) for a, b in runs(row.labels)]


def attempt(tokenizer: Any, row: dict[str, Any], **options: Any) -> tuple[list[Any], str | None]:
    """(rows, None), or ([], code) where the row is refused."""
    try:
        return PromptMasker(tokenizer, **options).encode(row), None
    except MaskingError as error:
        return [], error.code


def code_of(function: Any, *args: Any) -> str:
    with pytest.raises(MaskingError) as caught:
        function(*args)
    assert caught.value.remedy
    return str(caught.value.code)
