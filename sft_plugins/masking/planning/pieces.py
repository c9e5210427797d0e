"""What is true of two traced texts whatever the texts of the conversation are.

    one     "<u>" T0 "</u><a>"          T0: any text
    other   "<u>" T0 "</u><a>" T1       begins with the first, and T1 follows; of "<u>" T0 "</s>" it is never the beginning

Where it depends on a text (does T1 begin with "<think>"?) it is asked of this conversation, and the question kept for others
to be asked the same; where the answer leaves it open, nothing is said (`UndecidedError`).
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from jinja2.filters import do_trim

from sft_plugins.masking.rendering.following import as_json
from sft_plugins.masking.rendering.hidden import Tape, Text, joined
from sft_plugins.masking.turns.reasoning import first_difference

Pieces: TypeAlias = tuple[str | int, ...]
"""Strings, none of them empty and no two side by side, and numbers of the steps that make the texts between them."""

_TRIMMING = frozenset({str.strip, str.lstrip, str.rstrip, do_trim})


class UndecidedError(Exception):
    """What is asked of two texts is not the same for all conversations that answer as this one."""


def settled(pieces: Pieces, tape: Tape) -> Pieces:
    """The same text, with no strings side by side and no text in it that is empty."""
    made: list[str | int] = []
    for piece in pieces:
        if type(piece) is int and not tape.values[piece]:
            tape.ask(_is_empty, (piece,))
        elif type(piece) is str and made and type(made[-1]) is str:
            made[-1] += piece
        elif piece != "":
            made.append(piece)
    return tuple(made)


class Compared(NamedTuple):
    """A text beside another that it may begin with.

    Attributes:
        rest: what follows the other; None where the text never begins with it.
        shared: pieces of the other that hold all they have in common.
    """

    rest: Pieces | None
    shared: Pieces


def compare(whole: Pieces, beginning: Pieces, tape: Tape) -> Compared:
    """Raises:
    UndecidedError: where `whole` may begin with `beginning` or not.
    """
    own, wanted = [*whole], [*beginning]
    shared: list[str | int] = []
    while wanted:
        if not own and any(type(piece) is str for piece in wanted):
            return Compared(None, (*shared, *wanted))  # which is longer than the whole
        if not own:
            raise UndecidedError
        one, other = own[0], wanted[0]
        both: str | int = one
        if type(one) is str and type(other) is str:
            both = one[: first_difference(one, other)]
            if both not in (one, other):
                return Compared(None, (*shared, both))
            own[:1] = [one[len(both) :]] * (one != both)
            wanted[:1] = [other[len(both) :]] * (other != both)
        elif one == other:
            del own[0], wanted[0]
        else:
            hidden = [piece for piece in (one, other) if type(piece) is int]
            strings = [piece for piece in (one, other) if type(piece) is str]
            if not tape.ask(_parted, tuple(hidden), tuple(strings)):
                raise UndecidedError
            return Compared(None, (*shared, other))
        shared.append(both)
    return Compared(tuple(own), tuple(shared))


def never_holds(pieces: Pieces, texts: tuple[str, ...], tape: Tape) -> None:
    """Raises:
    UndecidedError: unless the text holds none of `texts`.
    """
    text = joined(*(Text(tape, piece) if type(piece) is int else piece for piece in pieces))
    if _holds_any(text, *texts) if type(text) is str else text.asked(_holds_any, *texts):
        raise UndecidedError


def closes(pieces: Pieces, endings: tuple[str, ...]) -> None:
    """Whether one of `endings` stands at the end, white space behind it aside, is the same for all.

    Raises:
        UndecidedError: where the last string of the template is too short to tell.
    """
    bare = pieces[-1].rstrip() if pieces and type(pieces[-1]) is str else ""
    if not bare.endswith(endings) and any(ending.endswith(bare) for ending in endings):
        raise UndecidedError


def holds(pieces: Pieces, slot: int, tape: Tape) -> bool:
    """Whether what is in `slot` stands in them, as the data has it but for white space at a text's ends, or as JSON."""
    hidden = [piece for piece in pieces if type(piece) is int]
    if any(_is_written(piece, slot, tape) for piece in hidden):
        return True
    number = tape.book.slot(slot)
    if type(tape.values[number]) is not str:
        return False
    return any(
        _alike(tape.values[piece], tape.values[number]) and tape.ask(_alike, (piece, number)) for piece in hidden
    )


def _is_written(number: int, slot: int, tape: Tape) -> bool:
    make, hidden, plain = tape.book.steps[number]
    if make is None:
        return plain == (slot,)
    trims = make in _TRIMMING and all(argument is None or str(argument).isspace() for argument in plain)
    return (trims or make in (as_json, str)) and len(hidden) == 1 and _is_written(hidden[0], slot, tape)


def _is_empty(text: str) -> bool:
    return not text


def _parted(one: str, other: str) -> bool:
    """Whether neither text begins with the other."""
    return not (one.startswith(other) or other.startswith(one))


def _holds_any(text: str, *parts: str) -> bool:
    return any(part in text for part in parts)


def _alike(one: str, other: str) -> bool:
    return one.strip() == other.strip()
