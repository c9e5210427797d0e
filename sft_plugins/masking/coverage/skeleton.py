"""The rendering of a planted conversation, as text between marks, and the match of a real rendering with it.

    planted     "<u>Zq00000qZ</u>\\n<a>Zq00001qZ</a>"        literals "<u>" "</u>\\n<a>" "</a>"        order 0 1
    rendered    "<u>2 + 2?</u>\\n<a>4</a>"                   spans    0: (3, 9)   1: (17, 18)

A rendering that matches holds every marked text at a known place, and nothing but the template's own text around it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sft_plugins.masking.coverage.planting import MARK, Slot

_SPACE = re.compile(r"\s*")


class Span(NamedTuple):
    """Where the text of a slot stands in a rendering."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True)
class Skeleton:
    """Texts of the template around the marks, one more than there are marks."""

    literals: list[str]
    order: list[int]

    @classmethod
    def of(cls, rendered: str) -> Skeleton:
        literals, order, position = [], [], 0
        for mark in MARK.finditer(rendered):
            literals.append(rendered[position : mark.start()])
            order.append(int(mark[1] or mark[2]))
            position = mark.end()
        return cls([*literals, rendered[position:]], order)

    def match(self, rendered: str, slots: Sequence[Slot], *, whole: bool = True) -> list[Span] | None:
        """The spans of the texts in `rendered`; None if it is not the skeleton with the texts in place of the marks.

        White space at the ends of a text is free: templates trim it. `whole=False`: what follows the last mark is free too.
        """
        if not rendered.startswith(self.literals[0]):
            return None
        position = len(self.literals[0])
        spans: list[Span] = []
        for number, literal in zip(self.order, self.literals[1:], strict=True):
            last = len(spans) + 1 == len(self.order)
            text = slots[number].text
            if not last and type(text) is str:  # as it stands, as most do
                bare = text.strip()
                end = position + len(bare)
                if rendered.startswith(bare, position) and rendered.startswith(literal, end):
                    spans.append(Span(number, position, end))
                    position = end + len(literal)
                    continue
            for spelling in slots[number].spellings():
                start = position
                if not rendered.startswith(spelling, start):
                    start = _skip(rendered, position)
                    if not rendered.startswith(spelling, start):
                        continue
                end = start + len(spelling)
                following = end if last and not whole else _after(rendered, end, literal, last=last)
                if following is not None:
                    spans.append(Span(number, start, end))
                    position = following
                    break
            else:
                return None
        if not self.order and whole and rendered != self.literals[0]:
            return None
        return spans


def _after(rendered: str, end: int, literal: str, *, last: bool) -> int | None:
    """Where `literal` ends that follows a text ending at `end`, white space of the text between them."""
    if rendered.startswith(literal, end) and (not last or end + len(literal) == len(rendered)):
        return end + len(literal)
    bare = literal.lstrip()
    lead = literal[: len(literal) - len(bare)]
    run = _skip(rendered, end)
    if not rendered.endswith(lead, end, run) or not rendered.startswith(bare, run):
        return None
    position = run + len(bare)
    return position if not last or position == len(rendered) else None


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position
