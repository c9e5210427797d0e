"""Turns planned once for all conversations of a shape.

    traces      a1's prompt  "<u>" T0 "</u><a>"       with a1  "<u>" T0 "</u><a>" T1 "</a>"        T0, T1: any texts
    pattern     a1 goes on from its prompt, its response is T1 "</a>", and every text stands in its place
    conversation  "hi", "yo"        turn  prompt "<u>hi</u><a>"  response "yo</a>"

What planning and coverage find out of a chat (no reasoning, no calls) they read off its renderings. Where the pieces of the
traces decide it for all texts that answer alike, the turns of another such chat are its texts in the same places; where they
do not, no pattern is made. One plan in `EVERY` is made anew all the same, and no pattern is used any more once two differ.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, NamedTuple

from sft_plugins.masking.coverage.planting import think_pieces
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.messages import Message
from sft_plugins.masking.planning.pieces import Pieces, UndecidedError, closes, compare, holds, never_holds
from sft_plugins.masking.rendering.hidden import Book, Tape, Values
from sft_plugins.masking.rendering.quick import EVERY, QuickConversation
from sft_plugins.masking.rendering.template import ChatRenderer
from sft_plugins.masking.turns.modes import Mode, Modes, switched
from sft_plugins.masking.turns.reasoning import TAGS
from sft_plugins.masking.turns.turns import Turn

_ALIKE = 4  # patterns of one shape, which differ in their answers
_ATTEMPTS = 3  # at a shape of whose conversations none gave a pattern
_SHAPES = 4096  # more at a time are forgotten


class _TurnPattern(NamedTuple):
    """A turn, its texts in pieces. `prompt` is used where nothing is `added` to a row."""

    like: Turn
    mode: Mode
    prompt: Pieces
    added: Pieces | None
    response: Pieces


class Pattern(NamedTuple):
    """Turns of every chat of a shape whose texts give `answers` to the steps `questions` of the `book`."""

    book: Book
    questions: tuple[int, ...]
    answers: tuple[Any, ...]
    turns: tuple[_TurnPattern, ...]

    def fits(self, values: Values) -> bool:
        try:
            return all(values[question] == answer for question, answer in zip(self.questions, self.answers, strict=True))
        except Exception:  # an answer differs, and what is asked for next makes no sense
            return False

    def plan(self, conversation: Conversation, values: Values) -> list[Turn]:
        turns: list[Turn] = []
        row = ""
        for like, mode, prompt, added, response in self.turns:
            adds = None if added is None else _text(added, values)
            begins = _text(prompt, values) if adds is None else row + adds
            says = _text(response, values)
            row = begins + says
            told = switched(conversation, mode) if mode.switches else conversation
            turns.append(Turn(told, like.index, begins, says, adds, mode=like.mode))
        return turns


class _Known:
    """What is known of a shape: its patterns, how often it was planned anew, and how often in vain for a pattern."""

    def __init__(self) -> None:
        self.patterns: list[Pattern] = []
        self.planned = self.attempts = 0

    def may_make(self, turns: int) -> bool:
        """Whether to make a pattern, which takes as many traces as there are `turns`, and more: as many plans it must spare."""
        return self.planned > turns and self.attempts < _ATTEMPTS and len(self.patterns) < _ALIKE


class Patterns:
    """The patterns of one renderer's templates."""

    def __init__(self, renderer: ChatRenderer, modes: Modes, stops: tuple[str, ...]) -> None:
        """`stops`: texts of the tokens that stop generation."""
        self._renderer, self._modes, self._stops = renderer, modes, stops
        self._known: dict[Hashable, _Known] = {}
        self._used, self._usable = 0, True

    def turns(self, conversation: Conversation, indices: list[int], anew: Callable[[], list[Turn]]) -> list[Turn]:
        """What `anew` gives, the turns of `conversation` at `indices` with every text where it belongs, by a pattern if one fits."""
        messages = conversation.messages[: indices[-1] + 1]
        texts = _texts_of_chat(messages)
        if texts is None or not (self._usable and self._renderer.is_simple(conversation)):
            return anew()
        known = self._of_shape((self._renderer.around(conversation), *(message["role"] for message in messages), *indices))
        for pattern in known.patterns:
            if pattern.fits(values := Values(pattern.book, texts)):
                return self._held(pattern.plan(conversation, values), anew)
        turns = anew()
        known.planned += 1
        if known.may_make(len(turns)):
            known.attempts += 1
            with suppress(UndecidedError):
                known.patterns.append(_Making(self._renderer, conversation, self._modes, self._stops).of(turns))
                known.attempts = 0
        return turns

    def _of_shape(self, shape: Hashable) -> _Known:
        if shape not in self._known:
            if len(self._known) > _SHAPES:
                self._known.clear()
            self._known[shape] = _Known()
        return self._known[shape]

    def _held(self, turns: list[Turn], anew: Callable[[], list[Turn]]) -> list[Turn]:
        """`turns`; one time in so many held to `anew`."""
        self._used += 1
        if self._used % EVERY != 1:
            return turns
        own = anew()
        self._usable = own == turns
        return own


def _texts_of_chat(messages: list[Message]) -> list[str] | None:
    """The text of each message; None where one has more than a text, a blank one, or a thought in it."""
    texts: list[str] = []
    for message in messages:
        content = message.get("content")
        if len(message) != 2 or type(content) is not str or not content.strip():
            return None
        if message["role"] == "assistant" and len(think_pieces(content)) > 1:
            return None
        texts.append(content)
    return texts


class _Making:
    """A pattern in the making, of a conversation whose turns have been planned."""

    def __init__(
        self, renderer: ChatRenderer, conversation: Conversation, modes: Modes, stops: tuple[str, ...]
    ) -> None:
        self._renderer, self._conversation, self._stops = renderer, conversation, stops
        self._modes = modes.of(conversation)
        looked = renderer.look(conversation.messages, conversation)
        if looked is None:
            raise UndecidedError
        self._looked: dict[str, QuickConversation | None] = {self._modes[0].name: looked}
        self._book = looked.traced.book
        self._tape = Tape(self._book, looked.traced.values)

    def of(self, turns: list[Turn]) -> Pattern:
        """Raises:
        UndecidedError: where other conversations of its shape may have other turns.
        """
        if any(turn.changes or turn.at_stop or turn.plain for turn in turns):
            raise UndecidedError
        made: list[_TurnPattern] = []
        before: tuple[Pieces, Pieces] | None = None
        for turn in turns:
            mode, prompt, full = self._chosen(turn)
            response = self._rest(full, prompt)
            added = None if before is None else self._added(prompt, *before)
            if response is None or (added is None) != (turn.added is None):
                raise UndecidedError
            made.append(_TurnPattern(turn, mode, prompt, added, response))
            before = prompt, full
        self._check_coverage(made)
        questions = self._tape.questions
        return Pattern(self._book, tuple(questions), tuple(questions.values()), tuple(made))

    def _rest(self, whole: Pieces, beginning: Pieces) -> Pieces | None:
        return compare(whole, beginning, self._tape).rest

    def _chosen(self, turn: Turn) -> tuple[Mode, Pieces, Pieces]:
        """Mode, prompt and rendering of a turn, where all that `choose_mode` goes by is decided in every mode."""
        found: list[tuple[Mode, Pieces, Pieces]] = []
        for mode in self._modes:
            prompt, full = self._texts(mode, turn.index)
            closes(prompt, TAGS)
            if self._rest(full, prompt) is not None:
                found.append((mode, prompt, full))
        if len(found) > 1 and not all(mode.end_only for mode, _, _ in found):
            # Then the longest of their headers is chosen.
            headers = [self._rest(prompt, self._pieces(mode, turn.index, False)) for mode, prompt, _ in found]
            if any(header is None or any(type(piece) is int for piece in header) for header in headers):
                raise UndecidedError
        chosen = [one for one in found if turn.mode in (one[0].name, "")]
        if not chosen:
            raise UndecidedError
        return chosen[0]

    def _texts(self, mode: Mode, index: int) -> tuple[Pieces, Pieces]:
        default = self._modes[0]
        tail, own = default.tails[0], mode.tails[0]
        if mode is default or not (mode.end_only and tail):
            return self._pieces(mode, index, True), self._pieces(mode, index + 1, False)
        prompt, full = self._texts(default, index)
        last = prompt[-1]
        if type(last) is not str or not last.endswith(tail):
            raise UndecidedError
        return _without_blanks((*prompt[:-1], last.removesuffix(tail) + own)), full

    def _pieces(self, mode: Mode, end: int, generation_prompt: bool) -> Pieces:
        if mode.name not in self._looked:
            conversation = switched(self._conversation, mode)
            self._looked[mode.name] = self._renderer.look(conversation.messages, conversation)
        looked = self._looked[mode.name]
        trace = looked.trace(end, generation_prompt) if looked is not None and looked.traced.book is self._book else None
        if trace is None:
            raise UndecidedError
        for question, answer in zip(trace.questions, trace.answers, strict=True):
            self._tape.questions.setdefault(question, answer)
        return _without_blanks(trace.pieces)

    def _added(self, prompt: Pieces, prompt_before: Pieces, full_before: Pieces) -> Pieces | None:
        """What `prompt` adds to the row of the turn before, as `plan_turns` finds it."""
        following = self._rest(prompt, prompt_before)
        if following is None:
            return None
        added = self._rest(prompt, full_before)
        if added is None:  # nor may the row go on from a stop token
            response = self._rest(full_before, prompt_before) or ()
            never_holds(compare(following, response, self._tape).shared, self._stops, self._tape)
        return added

    def _check_coverage(self, turns: list[_TurnPattern]) -> None:
        """Every text in the prompt of the next turn of its row, and in the response that says it."""
        texts = [self._tape.values[self._book.slot(slot)] for slot in range(turns[-1].like.index + 1)]
        if texts != [message["content"] for message in self._conversation.messages[: len(texts)]]:
            raise UndecidedError  # more is hidden of this conversation than the text of each message
        rows: list[list[_TurnPattern]] = []
        for turn in turns:
            if turn.added is None:
                rows.append([])
            rows[-1].append(turn)
        for row in rows:
            indices = [turn.like.index for turn in row]
            for slot in range(indices[-1] + 1):  # that of the message of this number
                at = bisect_right(indices, slot)
                needed = [row[at].prompt] if at < len(row) else []
                needed += [row[at - 1].response] if slot in indices else []
                if not all(holds(pieces, slot, self._tape) for pieces in needed):
                    raise UndecidedError


def _text(pieces: Pieces, values: Values) -> str:
    return "".join([values[piece] if type(piece) is int else piece for piece in pieces])  # type: ignore[misc]


def _without_blanks(pieces: Pieces) -> Pieces:
    return tuple(piece for piece in pieces if piece != "")
