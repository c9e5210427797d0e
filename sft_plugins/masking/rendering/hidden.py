"""Values that a template is shown in place of a conversation's own, so that what it writes holds for other conversations too.

    shown    {"role": "user", "content": T}                              T: any text at all
    asked    {% if T.startswith("<") %}          → a question: true of this conversation, to be asked of every other
    made     T | trim                            → a text made from T, made anew from the text of every other
    written  "<u>" ~ (T | trim) ~ "</u>"         → a text of parts: "<u>", the made one, "</u>"

Hidden values are no strings, no numbers, no mappings. What a template does with one is either followed here or raises: Python's
own functions refuse what is none of their types, so that nothing can be learnt of a text without a question on record.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

_MADE = frozenset({
    "strip", "lstrip", "rstrip", "lower", "upper", "title", "capitalize", "replace", "removeprefix", "removesuffix",
})  # fmt: skip
_ASKED = frozenset({"startswith", "endswith", "isspace", "isdigit", "isalpha", "isalnum", "count", "find", "rfind"})
_CUT = frozenset({"split", "rsplit", "splitlines", "partition", "rpartition"})
_ARGUMENTS = (str, int, type(None))


TAPE = "__sft_plugins_tape__"
"""The name under which a run's `Tape` is a variable of the template."""


class NotFollowedError(Exception):
    """A template does something with a hidden value that is not followed here."""


class StructureAskedError(NotFollowedError):
    """… or looks into one of a `kind` that stands for more than a text."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"a template looks into a {kind}")
        self.kind = kind


class Step(NamedTuple):
    """`make(*hidden, *plain)`, the hidden ones by their numbers; a slot of the conversation where `make` is None."""

    make: Callable[..., Any] | None
    hidden: tuple[int, ...]
    plain: tuple[Any, ...]


class Book:
    """Every step that a template was seen to take, once, by number: what many traces have in common is done once."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._numbers: dict[Step, int] = {}

    def number(self, make: Callable[..., Any] | None, hidden: tuple[int, ...], plain: tuple[Any, ...]) -> int:
        step = Step(make, hidden, plain)
        if step not in self._numbers:
            self.steps.append(step)
            self._numbers[step] = len(self.steps) - 1
        return self._numbers[step]

    def slot(self, index: int) -> int:
        return self.number(None, (), (index,))


class Values(dict[int, Any]):
    """What the steps of a book come to for one conversation, each done when it is asked for."""

    def __init__(self, book: Book, slots: Sequence[Any]) -> None:
        super().__init__()
        self._steps, self._slots = book.steps, slots

    def __missing__(self, number: int) -> Any:
        make, hidden, plain = self._steps[number]
        value = self._slots[plain[0]] if make is None else make(*[self[one] for one in hidden], *plain)
        self[number] = value
        return value


class Tape:
    """A run of a template on hidden values: the questions it asked, in order, and what was the answer for this conversation."""

    def __init__(self, book: Book, values: Values) -> None:
        self.book, self.values = book, values
        self.questions: dict[int, Any] = {}

    def ask(self, make: Callable[..., Any], hidden: tuple[int, ...], plain: tuple[Any, ...] = ()) -> Any:
        number = self.book.number(make, hidden, plain)
        return self.questions.setdefault(number, self.values[number])


class Hidden:
    """A value of a conversation.

    Attributes:
        parts: strings that stand as they are, and numbers of steps.
        example: a value of the same type, of which tests of types are asked.
    """

    __slots__ = ("parts", "tape")
    __hash__ = None  # type: ignore[assignment]
    __iter__ = None
    example: Any

    def __init__(self, tape: Tape, *parts: str | int) -> None:
        self.tape, self.parts = tape, parts

    @property
    def number(self) -> int:
        """Of the step that makes it."""
        if len(self.parts) == 1 and type(self.parts[0]) is int:
            return self.parts[0]
        hidden = tuple(part for part in self.parts if type(part) is int)
        return self.tape.book.number(_joined, hidden, tuple(None if type(part) is int else part for part in self.parts))

    def made(self, make: Callable[..., Any], *plain: Any) -> Text:
        return Text(self.tape, self.tape.book.number(make, (self.number,), plain))

    def asked(self, make: Callable[..., Any], *plain: Any) -> Any:
        return self.tape.ask(make, (self.number,), plain)

    def __bool__(self) -> bool:
        return bool(self.asked(bool))

    def __eq__(self, other: object) -> Any:
        if isinstance(other, Hidden):
            return self.tape.ask(operator.eq, (self.number, other.number))
        if type(other) in (str, int, float, bool):
            return self.asked(operator.eq, other)
        if isinstance(other, str):  # a safe text, say, which equals a plain one
            raise NotFollowedError(f"compared with a {type(other).__name__}")
        return NotImplemented  # and so unequal, as strings and numbers are to everything else

    def _refuse(self, *_: Any) -> NoReturn:
        raise NotFollowedError("written out, or compared, by Python")

    __str__ = __repr__ = __format__ = _refuse


class Text(Hidden):
    """A string, or what is written where several are put together."""

    __slots__ = ()
    example = ""

    def method(self, name: str) -> Method:
        return Method(self, name)

    def __add__(self, other: object) -> Any:
        return joined(self, other) if type(other) in (str, Text) else NotImplemented

    def __radd__(self, other: object) -> Any:
        return joined(other, self) if type(other) is str else NotImplemented

    def __contains__(self, part: object) -> bool:
        if isinstance(part, Text):
            return bool(self.tape.ask(operator.contains, (self.number, part.number)))
        if type(part) is not str:
            raise NotFollowedError("a text holds texts")
        return bool(self.asked(operator.contains, part))

    def cut(self, piece: slice) -> Text:
        return self.made(_cut, piece.start, piece.stop, piece.step)

    def length(self) -> Length:
        return Length(self.tape, self.tape.book.number(len, (self.number,), ()))


class Whole(Hidden):
    """A mapping or a number, of a `kind`, that is written out as it stands or as JSON, or not at all."""

    __slots__ = ("example", "kind")

    def __init__(self, tape: Tape, number: int, kind: str, example: Any) -> None:
        super().__init__(tape, number)
        self.kind, self.example = kind, example

    def look(self, *_: Any) -> NoReturn:
        raise StructureAskedError(self.kind)

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = look
    __iter__ = __contains__ = __len__ = __index__ = __int__ = __float__ = look  # type: ignore[assignment]
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __neg__ = look


class Safe(Hidden):
    """A text marked as safe, of which nothing is followed but that it is written."""

    __slots__ = ()
    example = ""


class Length(Hidden):
    """How long a text is, of which only comparisons are followed."""

    __slots__ = ()
    example = 0

    def _compared(self, by: Callable[[Any, Any], bool], other: object) -> bool:
        if type(other) is not int:
            raise NotFollowedError("a length is compared with numbers")
        return bool(self.asked(by, other))

    def __lt__(self, other: object) -> bool:
        return self._compared(operator.lt, other)

    def __le__(self, other: object) -> bool:
        return self._compared(operator.le, other)

    def __gt__(self, other: object) -> bool:
        return self._compared(operator.gt, other)

    def __ge__(self, other: object) -> bool:
        return self._compared(operator.ge, other)


class Method:
    """A method of a text, looked up and not yet called. Python would compare two of one text as they are in memory."""

    __hash__ = None  # type: ignore[assignment]
    __str__ = __repr__ = __format__ = __eq__ = Hidden._refuse

    def __init__(self, text: Text, name: str) -> None:
        self._text, self._name = text, name

    def __call__(self, *args: Any) -> Any:
        own = getattr(str, self._name)
        if not all(type(one) in _ARGUMENTS or (type(one) is tuple and {*map(type, one)} <= {str}) for one in args):
            raise NotFollowedError(f"{self._name} of hidden arguments")
        if self._name in _MADE:
            return self._text.made(own, *args)
        if self._name in _ASKED:
            return self._text.asked(own, *args)
        if self._name in _CUT:
            text, book = self._text, self._text.tape.book
            cut = book.number(own, (text.number,), args)
            count = text.tape.ask(len, (cut,))
            return [Text(text.tape, book.number(operator.getitem, (cut,), (index,))) for index in range(count)]
        raise NotFollowedError(self._name)


def joined(*pieces: Any) -> Any:
    """Strings and texts, one behind the other; a string where there are no others."""
    tape = next((piece.tape for piece in pieces if type(piece) is Text), None)
    if tape is None:
        return "".join(pieces)
    parts: list[str | int] = []
    if not all(type(piece) in (str, Text) for piece in pieces):
        raise NotFollowedError("more than text is put together")
    for piece in pieces:
        for part in piece.parts if type(piece) is Text else (piece,):
            if type(part) is str and parts and type(parts[-1]) is str:
                parts[-1] += part
            else:
                parts.append(part)
    return Text(tape, *parts)


def _joined(*pieces: str | None) -> str:
    """`Hidden.number`: texts, and then the strings between them, None where a text belongs."""
    count = pieces.count(None)
    texts = iter(pieces[:count])
    return "".join(next(texts) if piece is None else piece for piece in pieces[count:])  # type: ignore[misc]


def _cut(text: str, *piece: int | None) -> str:
    return text[slice(*piece)]
