"""What is said of two texts in pieces holds for whatever texts answer as those did of which it was said."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_plugins.masking.planning.pieces import UndecidedError, closes, compare, holds, never_holds, settled
from sft_plugins.masking.rendering.following import as_json
from sft_plugins.masking.rendering.hidden import Book, Tape, Values
from testkit.properties import quiet

TEXTS = ["", "a", "b", "ab", "ba", "a ", " a", "<", "<a>", "</a>", "<a>b", "</a>x", "<a"]
STRINGS = ["<a>", "</a>", "<", "a", "ab", "x<a>", "> "]


class Row:
    """Texts in slots, as a conversation has them, and what was asked of them."""

    def __init__(self, book: Book, texts: list[str]) -> None:
        self.texts = texts
        self.tape = Tape(book, Values(book, texts))

    def text(self, pieces: Any) -> str:
        return "".join(self.tape.values[piece] if type(piece) is int else piece for piece in pieces)

    def answers_as(self, other: Row) -> bool:
        return all(self.tape.values[question] == answer for question, answer in other.tape.questions.items())


def books() -> tuple[Book, list[int]]:
    """A book with three slots, and the steps that trim them."""
    book = Book()
    slots = [book.slot(index) for index in range(3)]
    return book, slots + [book.number(str.strip, (slot,), ()) for slot in slots]


def pieces() -> st.SearchStrategy[tuple[str | int, ...]]:
    return st.lists(st.sampled_from([*range(6), *STRINGS]), max_size=5).map(tuple)


def rows() -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(TEXTS), min_size=3, max_size=3)


def shown(texts: list[str], others: list[list[str]]) -> tuple[Row, list[Row]]:
    book, _ = books()
    return Row(book, texts), [Row(book, other) for other in others]


@quiet(max_examples=1500)
@given(pieces(), pieces(), st.booleans(), rows(), st.lists(rows(), min_size=1, max_size=4))
def test_a_comparison_holds_for_all_that_answer_alike(
    whole: tuple[str | int, ...],
    beginning: tuple[str | int, ...],
    goes_on: bool,
    texts: list[str],
    others: list[list[str]],
) -> None:
    row, more = shown(texts, others)
    if goes_on:
        whole = beginning + whole
    whole, beginning = settled(whole, row.tape), settled(beginning, row.tape)
    try:
        found = compare(whole, beginning, row.tape)
    except UndecidedError:
        assert not goes_on, "a text goes on from its own beginning whatever stands in it"
        return
    for one in [row, *(other for other in more if other.answers_as(row))]:
        text, front = one.text(whole), one.text(beginning)
        if found.rest is None:
            assert not text.startswith(front)
            same = next(n for n in range(len(front) + 1) if n == len(text) or n == len(front) or text[n] != front[n])
            assert one.text(found.shared).startswith(front[:same])
        else:
            assert text == front + one.text(found.rest)
            assert one.text(found.shared) == front


@quiet(max_examples=600)
@given(pieces(), st.lists(st.sampled_from(STRINGS), min_size=1, max_size=2), rows(), st.lists(rows(), max_size=4))
def test_what_never_stands_in_a_text_or_closes_it_is_the_same_for_all_that_answer_alike(
    some: tuple[str | int, ...], wanted: list[str], texts: list[str], others: list[list[str]]
) -> None:
    row, more = shown(texts, others)
    some = settled(some, row.tape)
    decided = {}
    for name, ask in (
        ("held", lambda: never_holds(some, tuple(wanted), row.tape)),
        ("closed", lambda: closes(some, tuple(wanted))),
    ):
        try:
            decided[name] = ask() is None
        except UndecidedError:
            decided[name] = False
    endings = {one.text(some).rstrip().endswith(tuple(wanted)) for one in (row, *more) if one.answers_as(row)}
    assert not decided["closed"] or len(endings) == 1
    for one in [row, *(other for other in more if other.answers_as(row))]:
        assert not decided["held"] or not any(part in one.text(some) for part in wanted)


@quiet(max_examples=600)
@given(pieces(), rows(), st.lists(rows(), max_size=4))
def test_settled_pieces_are_the_same_text(
    some: tuple[str | int, ...], texts: list[str], others: list[list[str]]
) -> None:
    row, more = shown(texts, others)
    made = settled(some, row.tape)
    assert "" not in made
    assert not any(type(one) is type(other) is str for one, other in pairwise(made))
    for one in [row, *(other for other in more if other.answers_as(row))]:
        assert one.text(made) == one.text(some)


@quiet(max_examples=600)
@given(pieces(), rows(), st.lists(rows(), max_size=4))
def test_a_text_that_is_held_is_held_by_all_that_answer_alike(
    some: tuple[str | int, ...], texts: list[str], others: list[list[str]]
) -> None:
    row, more = shown(texts, others)
    for slot in range(3):
        if holds(some, slot, row.tape):
            for one in [row, *(other for other in more if other.answers_as(row))]:
                assert one.texts[slot].strip() in one.text(some)


def test_a_text_is_held_as_it_stands_or_trimmed_and_by_no_likeness() -> None:
    book, numbers = books()
    row = Row(book, ["yes", " yes ", "no"])
    lower = book.number(str.lower, (numbers[2],), ())
    lines = book.number(str.strip, (numbers[0],), ("\n",))
    letters = book.number(str.strip, (numbers[2],), ("n",))
    for held in ((numbers[0],), (lines,), ("x", numbers[3]), (book.number(as_json, (numbers[3],), ()),)):
        assert holds(held, 0, row.tape)
    assert not row.tape.questions
    # Alike here, which others are asked.
    assert holds((lower,), 2, row.tape)
    assert holds((numbers[0],), 1, row.tape)
    assert len(row.tape.questions) == 2
    for lacking in ((letters,), (numbers[0],), (), ("no",)):
        assert not holds(lacking, 2, row.tape)


def test_where_a_text_may_be_what_the_template_writes_nothing_is_said() -> None:
    book, (first, second, *_) = books()
    row = Row(book, ["<a>b", "b", ""])
    with pytest.raises(UndecidedError):
        compare(("<a>", second), (first,), row.tape)  # the first begins with what the template writes
    with pytest.raises(UndecidedError):
        compare((first,), (first, second), row.tape)  # the second may be empty elsewhere
    with pytest.raises(UndecidedError):
        closes((first,), ("<a>",))
    with pytest.raises(UndecidedError):
        closes(("a>",), ("<a>",))
    closes(("<a>\n",), ("<a>",))
    other = Row(book, ["<a>b", "b", ""])
    assert compare(("x", second), (first,), other.tape).rest is None
    assert [*other.tape.questions.values()] == [True]
