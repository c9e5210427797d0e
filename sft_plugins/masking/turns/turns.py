"""A conversation, or a pair of texts → the texts and ids of its supervised turns.

    messages          u1  a1  u2  a2
    turn a1           prompt  "<u>u1</u><a>"                    response "a1</a>"
    turn a2           prompt  "<u>u1</u><a>a1</a><u>u2</u><a>"  response "a2</a>"   added "<u>u2</u><a>"

`added` is what a turn's prompt appends to the row so far; None where the prompt does not go on from it, because the template
renders the earlier turns differently once they are history. A new row begins there. A pair is one turn without a template.
Only what stands up to a turn's stop token counts: Phi-3 writes its EOS behind the last turn alone, and rewrites nothing.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

from sft_plugins.errors import MaskingError
from sft_plugins.masking.checks import first_missing
from sft_plugins.masking.examples.formats import Conversation, TextPair
from sft_plugins.masking.examples.messages import REASONING_KEYS, Message, other_texts, reasoning_texts
from sft_plugins.masking.examples.values import check_text, leaves
from sft_plugins.masking.options import MaskingOptions
from sft_plugins.masking.rendering.template import ChatRenderer
from sft_plugins.masking.turns.modes import Choice, Modes, ModeTexts, choose_mode
from sft_plugins.masking.turns.reasoning import dropped, first_difference, inlined
from sft_plugins.masking.turns.stop_tokens import StopTokens
from sft_plugins.masking.turns.tokenizer import TextTokenizer


class Turn(NamedTuple):
    """Texts of one supervised turn, `conversation.messages[index]`; see the module's first lines.

    Attributes:
        plain: no template shapes it, so its prompt gets what `tokenizer(prompt)` puts there, and its response an end.
        at_stop: `added` goes on from the stop token of the turn before; what the template wrote behind that is left out.
        mode: switches of the template that give its prompt; empty where the template has one mode.
        changes: what was done so that the turn is exact, by name: `continued`, `reasoning_inlined`, …
        unread: what of its row of data the chat template does not read; the row's first turn has it.
    """

    conversation: Conversation
    index: int  # type: ignore[assignment]  # in place of a method of tuples
    prompt: str
    response: str
    added: str | None
    plain: bool = False
    at_stop: bool = False
    mode: str = ""
    changes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def message(self) -> Message:
        return self.conversation.messages[self.index]

    @property
    def where(self) -> str:
        return "the response" if self.plain else f"message {self.index} (assistant)"


def supervised_turns(
    conversation: Conversation, text: TextTokenizer, known: StopTokens, options: MaskingOptions
) -> list[int]:
    """The messages of `conversation` that are trained, in order. The first has a prompt.

    Raises:
        MaskingError: `no_supervised_tokens`, `empty_response`, `no_prompt`, `special_token_in_content`.
    """
    indices = [index for index, trained in enumerate(conversation.trainable) if trained]
    if options.train_on == "last":
        indices = indices[-1:]
    if indices[:1] == [0] and len(indices) > 1:  # nothing prompts it: it is context of what follows
        indices = indices[1:]
    _check_messages(conversation, indices, text, known, options)
    return indices


def plan_turns(
    conversation: Conversation,
    indices: list[int],
    modes: Modes,
    text: TextTokenizer,
    known: StopTokens,
    options: MaskingOptions,
) -> list[Turn]:
    """The turns of `conversation` at `indices` (`supervised_turns`).

    Raises:
        MaskingError: `empty_response`, `template_error`, `render_mismatch`, `content_lost`, `history_rewrite`.
    """
    greeting = options.train_on == "all" and conversation.trainable[0]
    found = modes.of(conversation)
    texts = ModeTexts(modes.renderer, conversation, indices, found[0])
    choices = [choose_mode(texts, found, index) for index in indices]
    changed: dict[int, str] = {}
    if any(choice is None for choice in choices):
        keyed = [i for i, message in enumerate(conversation.messages[: indices[-1] + 1]) if reasoning_texts(message)]
        if options.reasoning == "raise":
            raise _unknown_reasoning(keyed[0], conversation.messages[keyed[0]], modes.renderer)
        conversation = (inlined if options.reasoning == "inline" else dropped)(conversation, keyed)
        changed = dict.fromkeys(keyed, "reasoning_inlined" if options.reasoning == "inline" else "reasoning_dropped")
        _check_not_empty(conversation, indices)
        texts = ModeTexts(modes.renderer, conversation, indices, found[0])
        choices = [choose_mode(texts, found, index) for index in indices]
    turns: list[Turn] = []
    before: Choice | None = None
    for index, choice in zip(indices, choices, strict=True):
        if choice is None:
            raise _unknown_reasoning(index, conversation.messages[index], modes.renderer)
        added, at_stop = _added(before, choice, turns, text, known)
        if before is not None and added is None and options.on_history_rewrite == "raise":
            raise history_rewrite(index, "the template renders the turns before it differently once they are history")
        changes = [*choice.changes, *([changed[index]] if index in changed else [])]
        if greeting and not turns:
            changes.append("greeting_untrained")
        turns.append(
            Turn(
                texts.conversation(choice.mode), index, choice.prompt, choice.response, added, at_stop=at_stop,
                mode=choice.mode.name if len(found) > 1 else "", changes=tuple(changes),
            )
        )  # fmt: skip
        before = choice
    return turns


def _added(
    before: Choice | None, choice: Choice, turns: list[Turn], text: TextTokenizer, known: StopTokens
) -> tuple[str | None, bool]:
    """What the prompt adds to the row so far, and whether it does so right behind the last stop token."""
    if before is None or not choice.prompt.startswith(before.prompt):
        return None, False
    if choice.prompt.startswith(before.full):
        return choice.prompt[len(before.full) :], False
    start = len(before.prompt)
    same = first_difference(choice.prompt[start:], before.response)
    for stop in (text.decode([token]) for token in known.ids):
        end = before.response.find(stop) + len(stop)
        if len(stop) <= end <= same and first_missing(before.response[:end], turns[-1].message) is None:
            return choice.prompt[start + end :], True
    return None, False


def plan_pair(pair: TextPair, text: TextTokenizer, known: StopTokens, options: MaskingOptions) -> list[Turn]:
    """The one turn of a prompt and a response that are trained as they stand.

    Raises:
        MaskingError: `bad_schema`, `special_token_in_content`.
    """
    check_text(pair.prompt, "the prompt")
    check_text(pair.response, "the response")
    # A BOS in front is what `tokenizer(prompt)` would put there itself.
    _check_special(pair.prompt.removeprefix(text.tokenizer.bos_token or ""), "the prompt", text, known, options)
    messages = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.response}]
    return [Turn(Conversation(messages, [False, True]), 1, pair.prompt, pair.response, added=None, plain=True)]


# --- what is refused --------------------------------------------------------------------------------------------------


def history_rewrite(index: int, why: str) -> MaskingError:
    return MaskingError(
        f"message {index} cannot share a row with the turns before it: {why}.",
        code="history_rewrite",
        remedy='Use {on_history_rewrite:on_history_rewrite="split"} (one exact row per such turn), or '
        '{train_on:train_on="last"}.',
    )


def special_token_error(found: str, where: str, known: StopTokens, text: TextTokenizer) -> MaskingError:
    return MaskingError(
        f"{where} holds the text of the special token {found!r}, which would be tokenised as that token.",
        code="special_token_in_content",
        remedy="Clean the data: such text can forge a turn. "
        '{special_tokens_in_content:special_tokens_in_content="allow"} trains it as it stands.'
        if text.special[found] in known.structural
        else "It begins and ends no turn, so decide: {special_token:special_tokens_in_content=[that token]} trains it as a "
        "token, or clean the data.",
    )


def _check_special(content: str, where: str, text: TextTokenizer, known: StopTokens, options: MaskingOptions) -> None:
    for found in text.special_in(content):
        if not options.allows(found):
            raise special_token_error(found, where, known, text)


def _check_messages(
    conversation: Conversation, indices: list[int], text: TextTokenizer, known: StopTokens, options: MaskingOptions
) -> None:
    if not indices:
        raise MaskingError(
            "the conversation has no assistant message that carries loss.",
            code="no_supervised_tokens",
            remedy="Check roles, `weight` and `train`; such a row trains nothing.",
        )
    if indices[0] == 0:
        raise MaskingError(
            "the conversation begins with the assistant, so nothing prompts its first answer.",
            code="no_prompt",
            remedy='Give that message "train": false, or remove it.',
        )
    _check_not_empty(conversation, indices)
    _check_places(conversation, indices[-1] + 1, text, known, options)


def _check_places(
    conversation: Conversation, end: int, text: TextTokenizer, known: StopTokens, options: MaskingOptions
) -> None:
    messages = conversation.messages[:end]
    others = [other_texts(message) for message in messages]
    texts = [*conversation.texts[:end], *chain.from_iterable(others)]
    texts += [*leaves(conversation.tools), *leaves(conversation.template_kwargs)]
    if not text.has_special("\0".join(texts)):  # nowhere, as in most rows: one search for all of it
        return
    places = [
        (f"message {index} ({message['role']})", [conversation.texts[index], *others[index]])
        for index, message in enumerate(messages)
    ]
    places += [("`tools`", leaves(conversation.tools))]
    places += [("`chat_template_kwargs`", leaves(conversation.template_kwargs))]
    for where, texts in places:
        _check_special("\0".join(texts), where, text, known, options)


def _check_not_empty(conversation: Conversation, indices: list[int]) -> None:
    for index in indices:
        message = conversation.messages[index]
        if not message.get("tool_calls") and not conversation.texts[index].strip("\0 \t\r\n"):
            raise MaskingError(
                f"message {index} (assistant) is empty.",
                code="empty_response",
                remedy='Remove it, or give it "train": false; {errors:errors="drop"} drops such rows and counts them.',
            )


def _unknown_reasoning(index: int, message: Message, renderer: ChatRenderer) -> MaskingError:
    looked_up = [key for key in REASONING_KEYS if key in renderer.names and key not in message]
    renamed = (
        f"Give it under the key {looked_up[0]!r}, which the template looks up; or choose " if looked_up else "Choose "
    )
    return MaskingError(
        f"message {index} (assistant): the chat template does not render the reasoning of the data.",
        code="content_lost",
        remedy=renamed
        + '{reasoning:reasoning="inline" (in front of the answer, in <think> tags) or reasoning="drop" (counted)}, '
        "or {a_chat_template:pass a `chat_template`} that renders it.",
    )
