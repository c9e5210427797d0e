"""The prompts a model is asked again and again, and how they become token ids: exactly what generation would be given.

A prompt is `open` (many good answers; narrowing is judged on these) or `closed` (one right answer; low variety is right
there, so these are the control). Prompts come from a list, a JSONL file, a dataset, or the built-in set:

    "Tell me about a morning."                                      a string
    {"prompt": "What is 2 + 2?", "tag": "closed"}                   a string with its tag
    {"messages": [{"role": "user", "content": "…"}], "tag": "open"} a conversation that ends before the answer

Each may carry what rows of data carry: `tools`, and `chat_template_kwargs` for the template (C16).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sft_plugins.errors import CollapseError, MaskingError
from sft_plugins.masking import PromptMasker

__all__ = ["TAGS", "Prompt", "encode_prompts", "load_prompts"]

TAGS = ("open", "closed")
_KEYS = frozenset({"prompt", "messages", "tag", "tools", "chat_template_kwargs"})


@dataclass(frozen=True)
class Prompt:
    """One question. `row` is what the chat template renders, as a row of data has it; `text` is what people read."""

    id: int
    messages: tuple[dict[str, Any], ...]
    tag: str
    tools: Any = None
    template_kwargs: Any = None

    @property
    def text(self) -> str:
        return "\n".join(filter(None, (_text(message) for message in self.messages)))

    @property
    def row(self) -> dict[str, Any]:
        row = {"messages": list(self.messages), "tools": self.tools, "chat_template_kwargs": self.template_kwargs}
        return {key: value for key, value in row.items() if value is not None}

    @property
    def definition(self) -> list[Any]:
        """What tells this prompt from any other, for hashes. Tools and switches only where there are any, so that a prompt
        without keeps the hash it had in histories of 0.1.0.
        """
        extra = {key: value for key, value in self.row.items() if key != "messages"}
        return [self.messages, self.tag, *([extra] if extra else [])]


def load_prompts(
    source: str | Path | Iterable[Any] | None = None, *, tools: Any = None, chat_template_kwargs: Any = None
) -> tuple[Prompt, ...]:
    """Prompts with ids 0, 1, … in the order given.

    Args:
        source: a list or a `datasets.Dataset` of the forms above, the path of a JSONL file of them, or None /
            "builtin".
        tools, chat_template_kwargs: for every prompt that has none of its own.

    Raises:
        CollapseError: `no_prompts`, `bad_prompt` (with its row), `duplicate_prompt`, `prompt_file`.
    """
    if source is None or source == "builtin":
        builtin = resources.files(__package__).joinpath("prompts.jsonl")
        source = _parse(builtin.read_text(encoding="utf-8"), str(builtin))
    elif isinstance(source, (str, Path)):
        try:
            source = _parse(Path(source).read_text(encoding="utf-8"), str(source))
        except (OSError, UnicodeDecodeError) as error:
            raise CollapseError(
                f"cannot read prompts from {str(source)!r}: {error}",
                code="prompt_file",
                remedy="{prompts:pass the path of a JSONL file in UTF-8, a list of prompts, or None for the built-in set}",
            ) from error
    prompts = tuple(
        _prompt(i, row, {"tools": tools, "chat_template_kwargs": chat_template_kwargs}) for i, row in enumerate(source)
    )
    if not prompts:
        raise CollapseError(
            "there are no prompts to sample from",
            code="no_prompts",
            remedy="{some_prompts:pass some, or None for the built-in set}",
        )
    first_seen: dict[str, int] = {}
    for prompt in prompts:
        key = json.dumps(prompt.row, sort_keys=True, default=str)
        if key in first_seen:
            # Its answers would count as answers to different prompts that are alike: a false sign of homogeneity.
            raise CollapseError(
                f"prompt {prompt.id} is the same as prompt {first_seen[key]}: {prompt.text[:80]!r}",
                code="duplicate_prompt",
                row=prompt.id,
                remedy="remove one; variety within a prompt is measured by {samples_per_prompt}",
            )
        first_seen[key] = prompt.id
    return prompts


def _parse(text: str, path: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n")):  # not splitlines: a prompt may hold U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise CollapseError(
                    f"line {number + 1} of {path} is not JSON: {error}",
                    code="bad_prompt",
                    row=number,
                    remedy='write one object per line: {"prompt": "…"}',
                ) from error
    return rows


def _prompt(index: int, row: Any, common: dict[str, Any]) -> Prompt:
    if isinstance(row, str):
        row = {"prompt": row}
    if isinstance(row, dict):
        row = {key: value for key, value in row.items() if value is not None}  # a data set fills what a row lacks
    if not isinstance(row, dict) or not set(row) <= _KEYS or ("prompt" in row) == ("messages" in row):
        got = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise CollapseError(
            "a prompt is a string, or a dict with either 'prompt' or 'messages' and an optional 'tag', 'tools' and "
            f"'chat_template_kwargs'; got {got}",
            code="bad_prompt",
            row=index,
            remedy='pass "Tell a story.", or {"prompt": "Two plus two?", "tag": "closed"}',
        )
    row = {**{key: value for key, value in common.items() if value is not None}, **row}
    tag = row.get("tag") or "open"
    if tag not in TAGS:
        raise CollapseError(
            f"tag is {tag!r}; allowed: {', '.join(TAGS)}",
            code="bad_prompt",
            row=index,
            remedy="leave it out for an open prompt; closed ones have a single right answer",
        )
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    usable = isinstance(messages, Sequence) and all(
        isinstance(m, dict) and "role" in m and (_text(m) is not None or m.get("tool_calls")) for m in messages
    )
    if not usable or not messages or not any((_text(m) or "").strip() for m in messages):
        raise CollapseError(
            f"the prompt is empty or not a list of messages with text; got {str(messages)[:80]}",
            code="bad_prompt",
            row=index,
            remedy='give messages as [{"role": "user", "content": "…"}]',
        )
    if messages[-1]["role"] == "assistant":
        raise CollapseError(
            "the conversation ends with an answer", code="bad_prompt", row=index, remedy="end it with the question"
        )
    return Prompt(index, tuple(dict(m) for m in messages), tag, row.get("tools"), row.get("chat_template_kwargs"))


def _text(message: dict[str, Any]) -> str | None:
    """The text of a message, given as a string or in parts; None where it has none."""
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        return None if any(not isinstance(part, str) for part in parts) else "".join(map(str, parts))
    return content if isinstance(content, str) else None


def encode_prompts(
    prompts: Sequence[Prompt], masker: PromptMasker, *, max_new_tokens: int, context: int | None
) -> list[list[int]]:
    """Token ids of each prompt, with the generation prompt and BOS at most once (C5): what a masked row has before its answer.

    Args:
        masker: of the tokenizer that training uses. Without a chat template the plain text is asked, with the special
            tokens that `tokenizer(text)` puts in front.
        context: the model's longest sequence, prompt and answer together; None where it has no limit.

    Raises:
        CollapseError: `prompt_too_long`, `bad_prompt` (the template refuses the conversation).
    """
    encoded = []
    templated, bos = bool(masker.tokenizer.chat_template), masker.tokenizer.bos_token_id
    for prompt in prompts:
        try:
            ids = masker.encode_prompt(prompt.row if templated else {"prompt": prompt.text})
        except MaskingError as error:
            raise CollapseError(
                f"this prompt cannot be asked: {error.message}",
                code="bad_prompt",
                row=prompt.id,
                remedy=error.remedy or "use the roles and the order of turns that the template takes",
            ) from error
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if context is not None and len(ids) + max_new_tokens > context:
            raise CollapseError(
                f"the prompt has {len(ids)} tokens; with {max_new_tokens} new ones they exceed the model's {context}",
                code="prompt_too_long",
                row=prompt.id,
                remedy="shorten the prompt or lower {max_new_tokens}",
            )
        encoded.append(list(ids))
    return encoded
