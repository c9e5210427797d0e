"""What a tokenizer and its template give: ids, texts, and the words that the oracle has for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

IGNORE = -100


# The codes that the contract names, and two that are sharper than its `bad_schema`: what a template raises itself, and a
# conversation that begins with the assistant. An error with another one is a fault.
CODES = frozenset(
    {
        "bad_schema",
        "boundary",
        "content_lost",
        "double_bos",
        "empty_response",
        "history_rewrite",
        "id_out_of_range",
        "length_mismatch",
        "missing_stop",
        "no_prompt",
        "no_supervised_tokens",
        "overflow",
        "render_mismatch",
        "special_token_in_content",
        "template_error",
    }
)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What generation would be given before message `index`, and what it should then produce.

    `responses` are the texts that may be supervised: each ends with a stop token and leaves only whitespace and special
    tokens of the rendering behind. Empty when the turn cannot be exact; `codes` then says why. `borrowed` marks a stop
    that the next message's header brings (GLM), which a masker may take or refuse.
    """

    index: int
    prompt_ids: tuple[int, ...] = ()
    prompt: str = ""
    responses: tuple[str, ...] = ()
    borrowed: bool = False
    codes: frozenset[str] = frozenset()
    why: str = ""
    mode: tuple[tuple[str, Any], ...] = ()
    continued: bool = False


@dataclass(frozen=True, kw_only=True)
class Refusals:
    """`codes`: what a refusal of the row may carry. `must`: no row may be made of it. No codes: it has to be exact."""

    codes: frozenset[str] = frozenset()
    must: bool = False
    why: tuple[str, ...] = field(default=())


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def render(tokenizer: Any, messages: list[dict[str, Any]], row: dict[str, Any], *, generation: bool) -> str:
    # A batch of one, because transformers looks at conversation[0], which an empty prompt does not have.
    return str(
        tokenizer.apply_chat_template(
            [messages], tools=row.get("tools") or None, tokenize=False, add_generation_prompt=generation,
            **(row.get("chat_template_kwargs") or {}),
        )[0]
    )  # fmt: skip


def prompt_ids(tokenizer: Any, messages: list[dict[str, Any]], row: dict[str, Any]) -> tuple[int, ...]:
    """The ids that `model.generate` would be given."""
    ids = tokenizer.apply_chat_template(
        [messages], tools=row.get("tools") or None, tokenize=True, add_generation_prompt=True, return_dict=False,
        **(row.get("chat_template_kwargs") or {}),
    )[0]  # fmt: skip
    return tuple(int(i) for i in ids)
