"""Coverage: an argument is found in whichever way JSON writes it, and one that is not there is missed."""

from __future__ import annotations

from typing import Any

import pytest

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker
from testkit.conversations import call, user
from testkit.tokenizers import build_tokenizer

# Two templates that render the arguments of a call as JSON: with letters as they are, and in ASCII alone.
JSON_AS_IT_IS = "{{ call.function.arguments | tojson(ensure_ascii=False) }}"
JSON_IN_ASCII = "{{ call.function.arguments | tojson(ensure_ascii=True) }}"
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}{% for call in message.tool_calls or [] %}{{ call.function.name }}ARGUMENTS{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def masker(arguments: str) -> PromptMasker:
    tokenizer = build_tokenizer("qwen")
    tokenizer.chat_template = TEMPLATE.replace("ARGUMENTS", arguments)
    return PromptMasker(tokenizer)


def row(text: str) -> dict[str, Any]:
    return {"messages": [user("Weather?"), {"role": "assistant", "content": "", "tool_calls": [call({"city": text})]}]}


@pytest.mark.parametrize("arguments", [JSON_AS_IT_IS, JSON_IN_ASCII], ids=["as it is", "in ASCII"])
@pytest.mark.parametrize("text", ["Zürich", 'the "old" town', 'the "old" town of Zürich', "Zürich\nAltstadt", "a\\b"])
def test_arguments_with_escaped_characters_are_found(arguments: str, text: str) -> None:
    """A letter outside ASCII beside a character that JSON escapes: neither the text itself nor its ASCII form is there."""
    (made,) = masker(arguments).encode(row(text))
    assert any(label != -100 for label in made.labels)


@pytest.mark.parametrize("written", ['{"city": "Zurich"}', "{{ call.function.arguments | length }}"])
def test_arguments_that_the_template_writes_otherwise_are_missed(written: str) -> None:
    with pytest.raises(MaskingError) as caught:
        masker(written).encode(row("Zürich"))
    assert caught.value.code == "content_lost"
