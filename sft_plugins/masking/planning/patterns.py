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
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from sft_plugins.masking.coverage.planting import TOOLS, think_pieces
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.messages import REASONING_KEYS, Message
from sft_plugins.masking.planning.pieces import Pieces, UndecidedError, closes, compare, holds, never_holds, settled
from sft_plugins.masking.rendering.hidden import Book, Tape, Values
from sft_plugins.masking.rendering.quick import EVERY, QuickConversation
from sft_plugins.masking.rendering.template import ChatRenderer
from sft_plugins.masking.rendering.traced import Path
from sft_plugins.masking.turns.modes import Mode, Modes, switched
from sft_plugins.masking.turns.reasoning import TAGS, may_stand_elsewhere
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
        told: dict[str, Conversation] = {}
        row = ""
        for like, mode, prompt, added, response in self.turns:
            adds = None if added is None else _text(added, values)
            begins = _text(prompt, values) if adds is None else row + adds
            says = _text(response, values)
            row = begins + says
            if mode.name not in told:
                told[mode.name] = switched(conversation, mode) if mode.switches else conversation
            turns.append(Turn(told[mode.name], like.index, begins, says, adds, mode=like.mode))
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
        seen = self._seen(conversation, indices[-1] + 1) if self._usable else None
        if seen is None:
            return anew()
        known = self._of_shape((*seen.shape, *indices))
        for pattern in known.patterns:
            if pattern.fits(values := Values(pattern.book, seen.slots)):
                return self._held(pattern.plan(conversation, values), anew)
        turns = anew()
        known.planned += 1
        if known.may_make(len(turns)):
            known.attempts += 1
            with suppress(UndecidedError):
                known.patterns.append(_Making(self._renderer, conversation, seen, self._modes, self._stops).of(turns))
                known.attempts = 0
        return turns

    def _seen(self, conversation: Conversation, end: int) -> _Seen | None:
        """None of a conversation that no pattern is made of."""
        messages = conversation.messages[:end]
        texts = _texts_of_chat(messages)
        if texts is not None and self._renderer.is_simple(conversation):  # at less cost: what most conversations are
            return _Seen((self._renderer.around(conversation), *(message["role"] for message in messages)), texts)
        blanks = _blanks(messages)
        looked = None if blanks is None else self._renderer.look(messages, conversation)
        if blanks is None or looked is None:
            return None
        # Shapes are numbered anew with every book.
        return _Seen((looked.traced.book, *looked.traced.shape(end), *blanks), looked.traced.slots)

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


class _Making:
    """A pattern in the making, of a conversation whose turns have been planned."""

    def __init__(
        self, renderer: ChatRenderer, conversation: Conversation, seen: _Seen, modes: Modes, stops: tuple[str, ...]
    ) -> None:
        self._renderer, self._conversation, self._stops = renderer, conversation, stops
        self._modes = modes.of(conversation)
        looked = renderer.look(conversation.messages, conversation)
        if looked is None:
            raise UndecidedError
        self._looked: dict[str, QuickConversation | None] = {self._modes[0].name: looked}
        self._book = looked.traced.book
        self._tape = Tape(self._book, looked.traced.values)
        self._needed: list[tuple[int, int]] = []  # slots whose contents no rendering may lack, each behind its owner
        self._thoughts: dict[int, list[int]] = {}  # slots of a message's reasoning, under all of its names
        end = max(index for index, trained in enumerate(conversation.trainable) if trained) + 1
        looked.traced.shape(end)
        for slot, path in enumerate(looked.traced.places(end)):
            self._account(slot, path, looked.traced.slots[slot])
        if looked.traced.slots != seen.slots:
            raise UndecidedError  # which are numbered otherwise

    def _account(self, slot: int, path: Path, value: Any) -> None:
        """What coverage has to say of a slot."""
        owner, *inner = path
        if owner == "documents" or (owner == "tools" and len(inner) > 1):
            raise UndecidedError  # its keys are no slots, and may be lost
        if owner == "tools":
            self._needed.append((TOOLS, slot))
        elif inner[0] in REASONING_KEYS and value.strip():
            self._thoughts.setdefault(int(owner), []).append(slot)
        elif inner[0] == "content" and value.strip():
            self._needed.append((int(owner), slot))
        elif inner[0] == "tool_calls" and inner[2] == "function" and inner[3] in ("name", "arguments"):
            if len(inner) > 4:
                raise UndecidedError
            self._needed.append((int(owner), slot))

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
            response = self._rest(full, prompt)
            if response is not None:
                thoughts = self._thoughts.get(turn.index)
                if thoughts and not any(holds(response, slot, self._tape) for slot in thoughts):
                    raise UndecidedError
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
        return settled((*prompt[:-1], last.removesuffix(tail) + own), self._tape), full

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
        return settled(trace.pieces, self._tape)

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
        """Every text in the prompt of the next turn of its row, and in the response that says it.

        Thoughts, which a history may leave out, were found in their own turns.
        """
        rows: list[list[_TurnPattern]] = []
        for turn in turns:
            if turn.added is None:
                rows.append([])
            rows[-1].append(turn)
        for row in rows:
            indices = [turn.like.index for turn in row]
            for owner, slot in self._needed:
                at = bisect_right(indices, owner)
                needed = [row[at].prompt] if at < len(row) else []
                needed += [row[at - 1].response] if owner in indices else []
                if not all(holds(pieces, slot, self._tape) for pieces in needed):
                    raise UndecidedError


def _text(pieces: Pieces, values: Values) -> str:
    return "".join([values[piece] if type(piece) is int else piece for piece in pieces])  # type: ignore[misc]

