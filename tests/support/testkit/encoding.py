"""Rows masked, and what became of them: text, spans, refusals, the report."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, mask_dataset
from testkit import mask_oracle
from testkit.conversations import TemplateKnobs, assistant, user
from testkit.mask_oracle import IGNORE, decode, runs
from testkit.tokenizers import build_tokenizer, stop_ids_for_template, tokenizer_for_template

SUM = [user("What is 2 + 2?"), assistant("It is four.")]
PRODUCT = [user("What is 6 * 7?"), assistant("42.")]
# Under STRIP, whose earlier answers lose their reasoning, SPLIT becomes two rows.
STRIP = TemplateKnobs(reasoning="strip_history").jinja()
SPLIT = {
    "messages": [
        user("6 * 7?"),
        assistant("42.", reasoning_content="Six sevens."),
        user("6 * 8?"),
        assistant("48.", reasoning_content="Six more."),
    ]
}


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


def spans(tokenizer: Any, rows: list[Any]) -> list[tuple[str, str]]:
    """(the last 40 characters before, the text) of every supervised run."""
    return [
        (decode(tokenizer, row.input_ids[:a])[-40:], decode(tokenizer, row.input_ids[a:b]))
        for row in rows
        for a, b in runs(row.labels)
    ]


def encode(name: str, messages: list[dict[str, Any]], **options: Any) -> tuple[Any, list[Any]]:
    """The rows under template `name`, held to the oracle."""
    tokenizer = tokenizer_for_template(name)
    rows = PromptMasker(tokenizer, **options).encode({"messages": messages})
    faults = mask_oracle.violations(tokenizer, {"messages": messages}, rows, stop_ids=stop_ids_for_template(name))
    assert faults == []
    return tokenizer, rows


def refusal(tokenizer: Any, row: dict[str, Any], **options: Any) -> MaskingError:
    with pytest.raises(MaskingError) as caught:
        PromptMasker(tokenizer, **options).encode(row)
    assert caught.value.remedy
    return caught.value


def report_of(tokenizer: Any, *rows: dict[str, Any], **options: Any) -> Any:
    return mask_dataset(Dataset.from_list(list(rows)), PromptMasker(tokenizer, **options)).report


def masked(name: str, row: dict[str, Any], **options: Any) -> tuple[str, str]:
    """The text of the rows that template `name` makes, and of what is supervised in them."""
    tokenizer = tokenizer_for_template(name)
    rows = PromptMasker(tokenizer, **options).encode(row)
    trained = [i for one in rows for i in one.labels if i != IGNORE]
    return "".join(tokenizer.decode(one.input_ids) for one in rows), tokenizer.decode(trained)


def refusal_code(name: str, row: dict[str, Any], **options: Any) -> str:
    with pytest.raises(MaskingError) as caught:
        PromptMasker(tokenizer_for_template(name), **options).encode(row)
    assert caught.value.remedy
    return caught.value.code


def bare(row: Any, **options: Any) -> Any:
    return PromptMasker(build_tokenizer("qwen"), **options).encode(row)


def bare_code(row: Any, **options: Any) -> str:
    with pytest.raises(MaskingError) as caught:
        bare(row, **options)
    return caught.value.code
