"""Turns planned once for all conversations of a shape.

    traces      a1's prompt  "<u>" T0 "</u><a>"       with a1  "<u>" T0 "</u><a>" T1 "</a>"        T0, T1: any texts
    pattern     a1 goes on from its prompt, its response is T1 "</a>", and every text stands in its place
    conversation  "hi", "yo"        turn  prompt "<u>hi</u><a>"  response "yo</a>"

What planning and coverage find out, they read off renderings, and off a message whether it holds a thought. Where the pieces
of the traces decide that for all texts that answer alike, the turns of another conversation of the shape are its texts in the
same places; where they do not, no pattern is made. One plan in `EVERY` is made anew all the same, and held to
`apply_chat_template`; no pattern is used any more once two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from sft_plugins.masking.coverage.planting import think_pieces
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.messages import REASONING_KEYS, Message
from sft_plugins.masking.planning.making import Making
from sft_plugins.masking.planning.pattern import Pattern
from sft_plugins.masking.planning.pieces import UndecidedError
from sft_plugins.masking.rendering.quick import EVERY
from sft_plugins.masking.rendering.template import ChatRenderer, TurnText
from sft_plugins.masking.turns.modes import Modes
from sft_plugins.masking.turns.reasoning import may_stand_elsewhere
from sft_plugins.masking.turns.turns import Turn

_ALIKE = 4  # patterns of one shape, which differ in their answers
_TURNS = 64  # of a conversation; more take too long to trace at once
_ATTEMPTS = 3  # at a shape of whose conversations none gave a pattern
_SHAPES = 4096  # more at a time are forgotten


class _Known:
    """What is known of a shape: its patterns, the plans since one was tried to be made, and the attempts that were in vain."""

    def __init__(self) -> None:
        self.patterns: list[Pattern] = []
        self.plans = self.in_vain = 0

    def may_make(self, turns: int) -> bool:
        """Whether to make a pattern: it takes a trace or two for every turn, so as many plans must have gone before."""
        self.plans += 1
        return self.plans > 2 * turns and turns <= _TURNS and self.in_vain < _ATTEMPTS and len(self.patterns) < _ALIKE


class Patterns:
    """The patterns of one renderer's templates."""

    def __init__(self, renderer: ChatRenderer, modes: Modes, stops: tuple[str, ...]) -> None:
        """`stops`: texts of the tokens that stop generation."""
        self._renderer, self._modes, self._stops = renderer, modes, stops
        self._known: dict[Hashable, _Known] = {}
        self._used, self._usable = 0, True

    def turns(self, conversation: Conversation, indices: list[int], anew: Callable[[], list[Turn]]) -> list[Turn]:
        """What `anew` gives: turns of `conversation` at `indices`, every text where it belongs; by a pattern if one fits."""
        seen = self._seen(conversation, indices[-1] + 1) if self._usable else None
        if seen is None:
            return anew()
        # What is trained of a greeting decides what is said of it.
        known = self._of_shape((seen.shape, *indices, conversation.trainable[0]))
        for pattern in known.patterns:
            if turns := pattern.plan(conversation, seen.slots):
                return self._held(turns, anew)
        turns = anew()
        if known.may_make(len(turns)):
            known.plans = 0
            try:
                known.patterns.append(self._made(conversation, seen, turns))
            except UndecidedError:
                known.in_vain += 1
        return turns

    def _made(self, conversation: Conversation, seen: _Seen, turns: list[Turn]) -> Pattern:
        looked = self._renderer.look(conversation.messages, conversation)
        if looked is None:
            raise UndecidedError
        with looked.traced.making:
            return Making(self._renderer, conversation, looked, self._modes, self._stops).of(turns, seen.slots)

    def _seen(self, conversation: Conversation, end: int) -> _Seen | None:
        """None of a conversation that no pattern is made of."""
        messages = conversation.messages[:end]
        texts = _texts_of_chat(messages)
        if texts is not None and self._renderer.is_simple(conversation):  # at less cost: what most conversations are
            roles = tuple(message["role"] for message in messages)
            return _Seen((self._renderer.around(conversation), roles), texts)
        blanks = _blanks(messages)
        looked = None if blanks is None else self._renderer.look(messages, conversation)
        if blanks is None or looked is None:
            return None
        # Shapes are numbered anew with every book.
        return _Seen((looked.traced.book, tuple(looked.traced.shape(end)), tuple(blanks)), looked.traced.slots)

    def _of_shape(self, shape: Hashable) -> _Known:
        if shape not in self._known:
            if len(self._known) > _SHAPES:
                self._known.clear()
            self._known[shape] = _Known()
        return self._known[shape]

    def _held(self, turns: list[Turn], anew: Callable[[], list[Turn]]) -> list[Turn]:
        """`turns`; one time in so many held to `anew`, and the last of them to `apply_chat_template`."""
        self._used += 1
        if self._used % EVERY != 1:
            return turns
        last = turns[-1]
        text = TurnText(last.index, last.prompt, last.prompt + last.response)
        self._usable = self._renderer.writes(last.conversation, text) and anew() == turns
        return turns if self._usable else anew()


class _Seen(NamedTuple):
    """A conversation: all that planning may go by besides its texts, and those, as traces number them."""

    shape: tuple[Hashable, ...]
    slots: Sequence[Any]


def _texts_of_chat(messages: list[Message]) -> list[str] | None:
    """The text of each message; None where one has more than a text, a blank one, or a thought in it."""
    texts: list[str] = []
    for message in messages:
        content = message.get("content")
        if len(message) != 2 or type(content) is not str or not content.strip() or _thinks(message, content):
            return None
        texts.append(content)
    return texts


def _blanks(messages: list[Message]) -> list[str | bool] | None:
    """Which texts are empty or blank; None where a thought stands in one, under two names, or where others may hold it too."""
    found: list[str | bool] = []
    for message in messages:
        thoughts = [message[key] for key in REASONING_KEYS if key in message]
        texts = [message.get("content", ""), *thoughts]
        if len(thoughts) > 1 or not all(type(text) is str for text in texts) or _thinks(message, texts[0]):
            return None
        if thoughts and may_stand_elsewhere(message):
            return None
        found += [text and text.isspace() for text in texts]
    return found


def _thinks(message: Message, content: str) -> bool:
    return message["role"] == "assistant" and len(think_pieces(content)) > 1
