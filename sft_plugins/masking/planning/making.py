"""A pattern, made of a conversation whose turns have been planned.

All that planning and coverage go by is looked up in the pieces of its traces: where they leave it to the texts, no pattern is
made (`UndecidedError`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from sft_plugins.masking.coverage.planting import TOOLS
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.messages import REASONING_KEYS
from sft_plugins.masking.planning.pattern import Pattern, TurnPattern
from sft_plugins.masking.planning.pieces import Pieces, UndecidedError, closes, compare, holds, never_holds, settled
from sft_plugins.masking.rendering.hidden import Tape
from sft_plugins.masking.rendering.quick import QuickConversation
from sft_plugins.masking.rendering.template import ChatRenderer
from sft_plugins.masking.rendering.traced import Path
from sft_plugins.masking.turns.modes import Mode, Modes, switched
from sft_plugins.masking.turns.reasoning import TAGS
from sft_plugins.masking.turns.turns import Turn


class _Texts(NamedTuple):
    """A turn with all of its prompt."""

    at: int
    prompt: Pieces
    response: Pieces


class Making:
    """A pattern in the making, of a conversation whose turns have been planned."""

    def __init__(
        self,
        renderer: ChatRenderer,
        conversation: Conversation,
        looked: QuickConversation,
        modes: Modes,
        stops: tuple[str, ...],
    ) -> None:
        self._renderer, self._conversation, self._stops = renderer, conversation, stops
        self._modes = modes.of(conversation)
        self._looked: dict[str, QuickConversation | None] = {self._modes[0].name: looked}
        self._traced, self._book = looked.traced, looked.traced.book
        self._tape = Tape(self._book, looked.traced.values)
        self._needed: list[tuple[int, int]] = []  # slots whose contents no rendering may lack, each behind its owner
        self._thoughts: dict[int, list[int]] = {}  # slots of a message's reasoning, under all of its names

    def _account(self, slot: int, path: Path, value: Any) -> None:
        """What coverage has to say of a slot. Keys are no slots: they are the same in all conversations of the shape."""
        owner, *inner = path
        if owner == "documents":
            raise UndecidedError
        if type(value) is str and not value.strip():
            return
        if owner == "tools":
            if len(inner) == 1 or inner[-1] in ("name", "description"):
                self._needed.append((TOOLS, slot))
        elif inner[0] in REASONING_KEYS:
            self._thoughts.setdefault(int(owner), []).append(slot)
        elif inner[0] == "content" or (
            inner[0] == "tool_calls" and inner[2:4] in (["function", "name"], ["function", "arguments"])
        ):
            self._needed.append((int(owner), slot))

    def of(self, turns: list[Turn], slots: Sequence[Any]) -> Pattern:
        """`slots`: as they will be numbered where the pattern is used.

        Raises:
            UndecidedError: where other conversations of its shape may have other turns.
        """
        if any(turn.changes or turn.at_stop or turn.plain for turn in turns):
            raise UndecidedError
        end = turns[-1].index + 1
        self._traced.shape(end)
        if self._traced.slots != slots:
            raise UndecidedError
        for slot, path in enumerate(self._traced.places(end)):
            self._account(slot, path, slots[slot])
        made: list[TurnPattern] = []
        rows: list[list[_Texts]] = []
        before: tuple[Pieces, Pieces] | None = None
        for turn in turns:
            mode, prompt, full = self._chosen(turn)
            response = self._rest(full, prompt)
            added = None if before is None else self._added(prompt, *before)
            if response is None or (added is None) != (turn.added is None):
                raise UndecidedError
            made.append(
                TurnPattern(turn.index, mode, turn.mode, added is None, prompt if added is None else added, response)
            )
            rows += [[]] if added is None else []
            rows[-1].append(_Texts(turn.index, prompt, response))
            before = prompt, full
        for row in rows:
            self._check_coverage(row)
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
        last = prompt[-1] if prompt else ""
        if type(last) is not str or not last.endswith(tail):
            raise UndecidedError
        return settled((*prompt[:-1], last.removesuffix(tail) + own), self._tape), full

    def _pieces(self, mode: Mode, end: int, generation_prompt: bool) -> Pieces:
        if mode.name not in self._looked:
            conversation = switched(self._conversation, mode)
            self._looked[mode.name] = self._renderer.look(conversation.messages, conversation)
        looked = self._looked[mode.name]
        trace = (
            looked.trace(end, generation_prompt) if looked is not None and looked.traced.book is self._book else None
        )
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

    def _check_coverage(self, row: list[_Texts]) -> None:
        """Every text in the prompt of the next turn of the row, and in the response that says it.

        Thoughts, which a history may leave out, were found in their own turns.
        """
        indices = [turn.at for turn in row]
        for owner, slot in self._needed:
            at = bisect_right(indices, owner)
            holders = [row[at].prompt] if at < len(row) else []
            holders += [row[at - 1].response] if owner in indices else []
            if not all(holds(pieces, slot, self._tape) for pieces in holders):
                raise UndecidedError
