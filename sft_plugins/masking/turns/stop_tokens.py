"""Which ids stop generation: the tokenizer's EOS, the generation config's, and the template's own end of turn.

The end of turn is read off the template by rendering a short conversation with a known answer and looking at the special
tokens after it; nothing is guessed from the names of tokens.

    <|im_start|>assistant\\nANSWER<|im_end|>\\n          →  <|im_end|>
    <start_of_turn>model\\nANSWER<end_of_turn>\\n        →  <end_of_turn>, though Gemma's EOS is <eos>
    <|assistant|>\\nANSWER<|user|>\\nQUESTION            →  no end of turn; the next header `<|user|>` ends it (GLM),
                                                          if the generation config says that it stops generation
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

from sft_plugins.errors import MaskingError
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.messages import Message
from sft_plugins.masking.rendering.template import ChatRenderer
from sft_plugins.masking.turns.tokenizer import TextTokenizer

_QUESTION, _ANSWER, _NEXT = "Zquestionq", "Zanswerq", "Znextq"


@dataclass(frozen=True)
class StopTokens:
    """Ids that stop generation.

    Attributes:
        headers: for the roles `user` and `tool` the one of `ids`, if any, that their header begins with.
        unconfirmed: those of `ids` that end the template's turns, while neither EOS nor a generation config names them.
        candidates: special tokens that end the template's turns or begin what follows them, none of `ids`.
        structural: special tokens that begin or end a text or a turn: `ids`, BOS, and what the template writes itself.
    """

    ids: frozenset[int]
    headers: Mapping[str, int] = field(default_factory=dict)
    unconfirmed: tuple[int, ...] = ()
    candidates: tuple[int, ...] = ()
    structural: frozenset[int] = frozenset()


def find_stop_tokens(text: TextTokenizer, renderer: ChatRenderer, given: Iterable[int] | None) -> StopTokens:
    """Ids that stop generation, `given` in place of the configured ones.

    Raises:
        MaskingError: `id_out_of_range` for given ids that are not in the vocabulary.
    """
    if given is not None:
        outside = [i for i in given if not (isinstance(i, int) and 0 <= i < text.size)]
        if outside:
            raise MaskingError(
                f"stop_token_ids {outside} are not in the vocabulary [0, {text.size}).",
                code="id_out_of_range",
                remedy="Pass ids of this tokenizer, for example tokenizer.convert_tokens_to_ids('<|im_end|>').",
            )
    stops = set(_configured(text.tokenizer) if given is None else given)
    configured = frozenset(stops)
    headers: dict[str, int] = {}
    candidates: list[int] = []
    structural = configured | {i for i in (text.tokenizer.bos_token_id, text.tokenizer.eos_token_id) if i is not None}
    if not renderer.available:
        return StopTokens(configured, structural=structural)
    for role, answer in (("user", {"content": _ANSWER}), ("tool", {"tool_calls": [_call()]})):
        turn: Message = {"role": "assistant", **answer}
        after = _after_answer(renderer, [turn])
        ids = _special(text, after)
        if ids and given is None and not stops.intersection(ids):
            # Behind a call stand the call's own delimiters; what ends the turn is the last of them.
            stops.add(ids[-1] if role == "tool" else ids[0])
        if not stops.intersection(ids):
            longer = _after_answer(renderer, [turn, {"role": role, "content": _NEXT}])
            header = _special(text, longer)[len(ids) : len(ids) + 1]
            candidates += ids[-1:] + header
            # Not where a template ends all turns but the last: that is no header of what follows.
            if longer.startswith(after) and stops.intersection(header):
                headers[role] = header[0]
    return StopTokens(
        frozenset(stops),
        headers,
        unconfirmed=tuple(sorted(stops - configured)),
        candidates=tuple(token for token in dict.fromkeys(candidates) if token not in stops),
        structural=structural | stops | _written_by(text, renderer),
    )


def _after_answer(renderer: ChatRenderer, turns: list[Message]) -> str:
    """What a rendering has between the answer and what is said next."""
    rendered = _rendered(renderer, [{"role": "user", "content": _QUESTION}, *turns])
    return rendered.rpartition(_ANSWER)[2].partition(_NEXT)[0]


def _special(text: TextTokenizer, rendered: str) -> list[int]:
    return [token for token in text.encode([rendered])[0] if token in text.special_ids]


def _written_by(text: TextTokenizer, renderer: ChatRenderer) -> set[int]:
    """Ids of the special tokens that the template itself writes around messages and calls."""
    question: Message = {"role": "user", "content": _QUESTION}
    answer: Message = {"role": "assistant", "content": _ANSWER}
    call: Message = {"role": "assistant", "tool_calls": [_call()]}
    system: Message = {"role": "system", "content": _NEXT}
    rendered = [
        _rendered(renderer, form) for form in ([question, answer], [question, call], [system, question, answer])
    ]
    return {token for ids in text.encode(rendered) for token in ids if token in text.special_ids}


def _rendered(renderer: ChatRenderer, messages: list[Message]) -> str:
    """The rendering of `messages`, in the form that the template takes; empty where it takes none."""
    # Templates of multimodal models take content as a list of parts, others as a string, some both.
    for form in (messages, [_in_parts(message) for message in messages]):
        try:
            rendered = renderer.render(form, Conversation(form, []), generation_prompt=False)
        except MaskingError:  # not this form, or no such message in this template
            continue
        if _ANSWER in rendered:
            return rendered
    return ""


def _configured(tokenizer: Any) -> list[int]:
    """The tokenizer's EOS, and the EOS ids of the generation config in its folder, or in the hub's cache for a hub id."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    name = str(getattr(tokenizer, "name_or_path", "") or "")
    if not name or (os.path.isdir(name) and not os.path.isfile(os.path.join(name, "generation_config.json"))):
        return found
    try:
        config = GenerationConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):  # not in the cache; nothing is downloaded for it
        return found
    return found + eos_ids(config)


def eos_ids(config: Any) -> list[int]:
    """The EOS ids of a generation config, which holds one, several or none."""
    eos = config.eos_token_id
    return list(eos) if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]


def _in_parts(message: Message) -> Message:
    return {key: [{"type": "text", "text": value}] if key == "content" else value for key, value in message.items()}


def _call() -> dict[str, Any]:
    return {"type": "function", "function": {"name": _ANSWER, "arguments": {}}}
