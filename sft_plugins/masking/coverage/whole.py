"""Does what a row trains hold the whole conversation, every text at the place of its message?

    prompt    every message, call, result, tool and document before the turn; earlier reasoning may be left out
    response  all of the turn itself, its reasoning included

Rows of one shape share a skeleton; a row that matches it is shown to hold every text in its place. A template may look at
texts (a `</think>` in a question, say): a row that does not match is rendered once more with a mark behind every text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence

from sft_plugins.errors import MaskingError
from sft_plugins.masking.coverage.planting import DOCUMENTS, MARK, TOOLS, Slot, outline, plant
from sft_plugins.masking.coverage.skeleton import Skeleton, Span
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.values import ignoring
from sft_plugins.masking.rendering.template import ChatRenderer
from sft_plugins.masking.turns.turns import Turn

_REMEMBERED = 4096


class Coverage:
    """Checks the turns of conversations rendered by one template."""

    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer = renderer
        self._skeletons: dict[Hashable, Skeleton | None] = {}

    def check(self, turns: Sequence[Turn]) -> None:
        """Raises:
        MaskingError: `content_lost` for the first text that is in no prompt, or not in the response it belongs to.
        """
        for row in _rows(turns):
            self._check_row(row)

    def _check_row(self, turns: list[Turn]) -> None:
        last = turns[-1]
        end, rendered = last.index + 1, last.prompt + last.response
        slots, spans = self._spans(last.conversation, end, rendered, generation_prompt=False)
        if spans is None:
            # The response is no rendering of the template: what precedes it is looked at alone.
            slots, spans = self._spans(last.conversation, last.index, last.prompt, generation_prompt=True)
            lost = _lost(slots, spans or [], turns)
        elif lost := _lost(slots, spans, turns):
            # The skeleton lacks a text; the row itself may hold it.
            behind = self._by_marks_behind(last.conversation, end, rendered, generation_prompt=False) or []
            lost = _lost(slots, spans + behind, turns)
        if lost:
            raise _content_lost(lost, last.conversation)

    def _spans(
        self, conversation: Conversation, end: int, rendered: str, *, generation_prompt: bool
    ) -> tuple[list[Slot], list[Span] | None]:
        shape, slots = outline(conversation, end)
        key = (shape, generation_prompt)
        if key not in self._skeletons:
            if len(self._skeletons) > _REMEMBERED:
                self._skeletons.clear()
            planted = self._rendered(plant(conversation, end).conversation, generation_prompt=generation_prompt)
            self._skeletons[key] = None if planted is None else Skeleton.of(planted)
        skeleton = self._skeletons[key]
        spans = None if skeleton is None else skeleton.match(rendered, slots, whole=not generation_prompt)
        if spans is None:
            spans = self._by_marks_behind(conversation, end, rendered, generation_prompt=generation_prompt)
        return slots, spans

    def _by_marks_behind(
        self, conversation: Conversation, end: int, rendered: str, *, generation_prompt: bool
    ) -> list[Span] | None:
        """Spans of the texts that a mark behind them shows; all at once, or those of each owner by itself.

        None where `rendered` is not what the template makes of the conversation.
        """
        if self._rendered(conversation, end, generation_prompt=generation_prompt) != rendered:
            return None
        spans: list[Span] = []
        for only in (None, TOOLS, DOCUMENTS, *range(end)):
            planted = plant(conversation, end, behind=True, only=only)
            marked = self._rendered(planted.conversation, generation_prompt=generation_prompt)
            found = None if marked is None else _spans_before_marks(marked, rendered, planted.slots)
            spans += found or []
            if only is None and found is not None:
                break
        return spans

    def _rendered(self, conversation: Conversation, end: int | None = None, *, generation_prompt: bool) -> str | None:
        try:
            return self._renderer.render(conversation.messages[:end], conversation, generation_prompt=generation_prompt)
        except MaskingError:  # the template looks at texts, and refuses the marks
            return None


def _rows(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    """Turns that share a row: each goes on from the text of the one before."""
    row: list[Turn] = []
    for turn in turns:
        if turn.added is None and row:
            yield row
            row = []
        row.append(turn)
    if row:
        yield row


def _spans_before_marks(marked: str, rendered: str, slots: Sequence[Slot]) -> list[Span] | None:
    """The spans in `rendered` of the texts that stand in `marked` right before their marks."""
    spans, pieces, position, length = [], [], 0, 0
    for mark in MARK.finditer(marked):
        if mark[1] is None or int(mark[1]) >= len(slots):
            continue
        pieces.append(marked[position : mark.start()])
        position = mark.end()
        length += len(pieces[-1])
        slot = int(mark[1])
        for spelling in slots[slot].spellings():
            if rendered.endswith(spelling, 0, length):
                spans.append(Span(slot, length - len(spelling), length))
                break
    return spans if "".join([*pieces, marked[position:]]) == rendered else None


def _lost(slots: Sequence[Slot], spans: Sequence[Span], turns: Sequence[Turn]) -> Slot | None:
    """The first slot whose text is not where one of `turns`, which share a row, needs it; those of messages first."""
    return min(_all_lost(slots, spans, turns), key=lambda slot: slot.owner < 0, default=None)


def _all_lost(slots: Sequence[Slot], spans: Sequence[Span], turns: Sequence[Turn]) -> Iterator[Slot]:
    places: list[list[Span]] = [[] for _ in slots]
    for span in spans:
        places[span.slot].append(span)
    indices = [turn.index for turn in turns]
    begins = [len(turn.prompt) for turn in turns]  # of what each turn says itself
    for slot, found in zip(slots, places, strict=True):
        if slot.needed == "never":
            continue
        at = bisect_right(indices, slot.owner)
        if slot.needed == "always" and at < len(turns):
            # Prompts grow, so what is in the next turn's is in all that follow.
            for span in found:
                if span.end <= begins[at]:
                    break
            else:
                yield slot
                continue
        if at and indices[at - 1] == slot.owner:
            begin = begins[at - 1]
            end = begin + len(turns[at - 1].response)
            if not any(begin <= span.start and span.end <= end for span in found):
                yield slot


def _content_lost(slot: Slot, conversation: Conversation) -> MaskingError:
    column = {TOOLS: "tools", DOCUMENTS: "documents"}.get(slot.owner)
    way = "{a_chat_template:pass a `chat_template`} that renders it"
    if column:
        where = f"`{column}`"
        remedy = f"To train with it, {way}; else name the column in {ignoring(column)}."
    else:
        where = f"message {slot.owner} ({conversation.messages[slot.owner]['role']})"
        remedy = (
            "The template drops or rewrites this part (a role it does not know, reasoning, calls or results?): "
            f"{way}, give the message another role with {{roles:roles=…}}, or take it out of the data."
        )
    return MaskingError(
        f"{where}: the chat template does not render the {slot.what} {str(slot.text)[:60]!r} of the data.",
        code="content_lost",
        remedy=remedy,
    )
