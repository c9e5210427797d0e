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
from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig

from sft_plugins.errors import MaskingError
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.messages import Message
from sft_plugins.masking.turns.template import ChatRenderer
from sft_plugins.masking.turns.tokenizer import TextTokenizer

_QUESTION, _ANSWER, _NEXT = "Zquestionq", "Zanswerq", "Znextq"


def find_stop_tokens(
    text: TextTokenizer, renderer: ChatRenderer, given: Iterable[int] | None
) -> tuple[frozenset[int], dict[str, int]]:
    """Ids that stop generation (`given` in place of the configured ones), and for the roles `user` and `tool` the one
    among them, if any, that their header begins with.

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
    headers: dict[str, int] = {}
    if not renderer.available:
        return frozenset(stops), headers
    for role, answer in (("user", {"content": _ANSWER}), ("tool", {"tool_calls": [_call()]})):
        turn: Message = {"role": "assistant", **answer}
        ids = _special_after_answer(text, renderer, [turn])
        if ids and given is None and not stops.intersection(ids):
            # Behind a call stand the call's own delimiters; what ends the turn is the last of them.
            stops.add(ids[-1] if role == "tool" else ids[0])
        if not stops.intersection(ids):
            following = _special_after_answer(text, renderer, [turn, {"role": role, "content": _NEXT}])
            header = following[len(ids) : len(ids) + 1]
            if stops.intersection(header):
                headers[role] = header[0]
    return frozenset(stops), headers


def _special_after_answer(text: TextTokenizer, renderer: ChatRenderer, turns: list[Message]) -> list[int]:
    """Ids of the special tokens between the answer and what follows it."""
    messages = [{"role": "user", "content": _QUESTION}, *turns]
    # Templates of multimodal models take content as a list of parts, others as a string, some both.
    for form in (messages, [_in_parts(message) for message in messages]):
        try:
            rendered = renderer.render(form, Conversation(form, []), generation_prompt=False)
        except MaskingError:  # not this form, or no tool calls in this template: there is no such end of turn
            continue
        _, answered, after = rendered.rpartition(_ANSWER)
        if answered:
            after = after.partition(_NEXT)[0]
            return [token for token in text.encode([after])[0] if token in text.special_ids]
    return []


def _configured(tokenizer: Any) -> list[int]:
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    folder = str(getattr(tokenizer, "name_or_path", "") or "")
    if os.path.isfile(os.path.join(folder, "generation_config.json")):
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        found += eos if isinstance(eos, list) else [] if eos is None else [eos]
    return found


def _in_parts(message: Message) -> Message:
    return {key: [{"type": "text", "text": value}] if key == "content" else value for key, value in message.items()}


def _call() -> dict[str, Any]:
    return {"type": "function", "function": {"name": _ANSWER, "arguments": {}}}
