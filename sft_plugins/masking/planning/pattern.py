"""Turns of all conversations of a shape, with pieces in place of texts; see `patterns.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.planning.pieces import Pieces
from sft_plugins.masking.rendering.hidden import Book, Values
from sft_plugins.masking.turns.modes import Mode, switched
from sft_plugins.masking.turns.turns import Turn


class TurnPattern(NamedTuple):
    """The turn at `messages[at]`.

    Attributes:
        named: what it calls its mode.
        prompt: all of it where it begins a row, else what it adds to the row.
    """

    at: int
    mode: Mode
    named: str
    begins_row: bool
    prompt: Pieces
    response: Pieces


class Pattern(NamedTuple):
    """Turns of every conversation of a shape whose texts give `answers` to the steps `questions` of the `book`."""

    book: Book
    questions: tuple[int, ...]
    answers: tuple[Any, ...]
    turns: tuple[TurnPattern, ...]

    def plan(self, conversation: Conversation, slots: Sequence[Any]) -> list[Turn] | None:
        """The turns of `conversation`; None where an answer differs, and what is asked for next may make no sense."""
        values = Values(self.book, slots)
        try:
            for question, answer in zip(self.questions, self.answers, strict=True):
                if values[question] != answer:
                    return None
            return self._filled(conversation, values)
        except Exception:
            return None

    def _filled(self, conversation: Conversation, values: Values) -> list[Turn]:
        turns: list[Turn] = []
        told: dict[str, Conversation] = {}
        row = ""
        for at, mode, named, begins_row, pieces, response in self.turns:
            if mode.name not in told:
                told[mode.name] = switched(conversation, mode) if mode.switches else conversation
            added, says = _text(pieces, values), _text(response, values)
            prompt = added if begins_row else row + added
            row = prompt + says
            turns.append(Turn(told[mode.name], at, prompt, says, None if begins_row else added, mode=named))
        return turns


def _text(pieces: Pieces, values: Values) -> str:
    return "".join([values[piece] if type(piece) is int else piece for piece in pieces])  # type: ignore[misc]
