"""A chat template run once for all conversations of one shape.

    messages    [{"role": "user", "content": T0}, {"role": "assistant", "content": T1}]        T0, T1: hidden texts
    trace       "<u>"  T0  "</u><a>"  strip(T1)  "</a>"        asked on the way: is "</think>" in T1? no

What a template writes is decided by the shape of what it is given (roles, keys, types, its variables) and by what it asks of
the texts. Another conversation of that shape whose texts give the same answers is rendered by putting its texts into the trace;
where an answer differs, another trace is made. See `hidden.py` for what can be followed; of all else nothing is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import count
from threading import RLock
from typing import Any, NamedTuple, TypeAlias

from jinja2.environment import Template

from sft_plugins.masking.rendering.following import following
from sft_plugins.masking.rendering.hidden import (
    TAPE,
    Book,
    Hidden,
    StructureAskedError,
    Tape,
    Text,
    Values,
    Whole,
    joined,
)

_ALIKE = 8  # traces of one shape, which differ in their answers
_KINDS = frozenset({"tool", "arguments", "number"})
_SHAPES = 8192  # more at a time are forgotten
_TRIED = 64  # traces that may be made before they must have been of use
_USES = 16  # that one trace must have, which is made in the time of some ten renderings
_ASKED = 512  # renderings after which a template is given up of which one in eight is not traced


Path: TypeAlias = tuple[str | int, ...]
_Leaf = Callable[[Any, str, Path], Any]


class Trace(NamedTuple):
    """`pieces` is what the template writes wherever the steps `questions` come to `answers`: strings, and numbers of steps."""

    questions: tuple[int, ...]
    answers: tuple[Any, ...]
    pieces: tuple[str | int, ...]

    def text(self, values: Values) -> str | None:
        """None where an answer differs, and what is asked for next may make no sense."""
        try:
            for question, answer in zip(self.questions, self.answers, strict=True):
                if values[question] != answer:
                    return None
            return "".join([values[piece] if type(piece) is int else piece for piece in self.pieces])  # type: ignore[misc]
        except Exception:
            return None


class _Traces:
    """What is known of a template. `whole`: kinds of values, besides texts, that it has not looked into yet."""

    def __init__(self, whole: frozenset[str]) -> None:
        self.whole, self.book = whole, Book()
        self.of: dict[tuple[int, ...], list[Trace]] = {}
        self.made = self.used = self.asked = 0
        self._numbers, self._shapes = count(), dict[Any, int]()

    def shape(self, looks: Any) -> int:
        """A number for what is not hidden; none twice, whatever threads ask."""
        return self._shapes.setdefault(looks, next(self._numbers))

    @property
    def may_grow(self) -> bool:
        return self.made < _TRIED + self.used // _USES

    @property
    def of_use(self) -> bool:
        return self.asked < _ASKED or self.used > self.asked // 8

    @property
    def full(self) -> bool:
        return max(len(self._shapes), len(self.of), self.made) > _SHAPES


class TracedTemplate:
    """A chat template that can be compiled, and the traces made of it.

    Attributes:
        usable: not any more once a trace gave another text than the template.
        making: held by whoever adds to the book of steps.
    """

    def __init__(self, source: str) -> None:
        self.usable, self.making = True, RLock()
        self.traces = _Traces(_KINDS)
        self._source = source

    @cached_property
    def template(self) -> Template:
        """Compiled when it is first needed, which for many a tokenizer is never."""
        return following(self._source)

    def look(self, messages: Sequence[Any], variables: dict[str, Any]) -> TracedConversation:
        if self.traces.full:
            self.traces = _Traces(self.traces.whole)
        return TracedConversation(self, messages, variables)


class TracedConversation:
    """What is hidden of a conversation, and what is not.

    Attributes:
        slots: what is hidden of the messages that have been looked at, in order.
        values: what the steps in the template's `book` come to for them; `making` is held while steps are added.
    """

    def __init__(self, traced: TracedTemplate, messages: Sequence[Any], variables: dict[str, Any]) -> None:
        self._traced, self._traces = traced, traced.traces
        self._messages, self._variables = messages, variables
        self.slots: list[Any] = []
        self.making = traced.making
        self.book = self._traces.book
        self.values = Values(self.book, self.slots)
        self._shapes: list[int] = []

    def render(self, end: int, generation_prompt: bool, *, otherwise: Callable[[int, bool], str | None]) -> str | None:
        """The first `end` messages by a trace, or `otherwise`, which a trace is then made to repeat."""
        traces = self._traces
        if not (self._traced.usable and traces.of_use):
            return otherwise(end, generation_prompt)
        traces.asked += 1
        shape = (generation_prompt, *self.shape(end))
        known = traces.of.get(shape)
        for trace in known or ():
            if (text := trace.text(self.values)) is not None:
                traces.used += 1
                return text
        text = otherwise(end, generation_prompt)
        if known is None:
            traces.of[shape] = []  # of a shape that comes once nothing is traced
        elif text is not None and len(known) < _ALIKE and traces.may_grow:
            traces.made += 1
            with self._traced.making:
                known += self._trace(end, generation_prompt, text)
        return text

    def trace(self, end: int, generation_prompt: bool, *, otherwise: Callable[[int, bool], str | None]) -> Trace | None:
        """The trace that gives the first `end` messages, made where there is none that does."""
        known = self._traces.of.setdefault((generation_prompt, *self.shape(end)), [])
        found = next((trace for trace in known if trace.text(self.values) is not None), None)
        if found is None and self._traced.usable and len(known) < _ALIKE:
            text = otherwise(end, generation_prompt)
            with self._traced.making:
                found = None if text is None else next(self._trace(end, generation_prompt, text), None)
                known += [found] if found else []
        return found

    def _trace(self, end: int, generation_prompt: bool, text: str) -> Iterator[Trace]:
        """A trace that gives `text` for this conversation."""
        traces = self._traces
        tape = Tape(traces.book, self.values)
        try:
            template = self._traced.template
            context = template.new_context(
                {**self._hidden(tape, end), "add_generation_prompt": generation_prompt, TAPE: tape}
            )
            written = joined(*template.root_render_func(context))
        except StructureAskedError as error:
            self._traced.traces = _Traces(traces.whole - {error.kind})
            return
        except Exception:  # something is not followed, or the template complains
            return
        pieces = written.parts if type(written) is Text else (written,)
        trace = Trace(tuple(tape.questions), tuple(tape.questions.values()), pieces)
        if trace.text(self.values) == text:
            yield trace
        else:
            self._traced.usable = False  # it sees through hidden values

    def shape(self, end: int) -> list[int]:
        """Numbers of the shapes of the variables and the first `end` messages."""
        if not self._shapes:
            self._shapes.append(self._traces.shape(repr(self._around(self._slot))))
        for message in self._messages[len(self._shapes) - 1 : end]:
            content = message.get("content")
            if len(message) == 2 and type(content) is str and type(message.get("role")) is str:
                self.slots.append(content)  # at less cost: what most messages are
                looks: Any = (message["role"], next(iter(message)))
            else:
                looks = repr(self._message(message, self._slot))
            self._shapes.append(self._traces.shape(looks))
        return self._shapes[: end + 1]

    def places(self, end: int) -> list[Path]:
        """Where each slot stands: `(3, "content")` of message 3, `("tools", 0, …)`."""
        found: list[Path] = []

        def leaf(value: Any, _: str, path: Path) -> type:
            found.append(path)
            return type(value)

        self._around(leaf)
        for index, message in enumerate(self._messages[:end]):
            self._message(message, leaf, (index,))
        return found

    def _slot(self, value: Any, _kind: str, _path: Path) -> type:
        self.slots.append(value)
        return type(value)

    def _hidden(self, tape: Tape, end: int) -> dict[str, Any]:
        """All that the template can look up, hidden in the order of the slots."""
        slots = count()

        def hide(value: Any, kind: str, _: Path) -> Hidden:
            number = tape.book.slot(next(slots))
            return Text(tape, number) if kind == "text" else Whole(tape, number, kind, type(value)())

        around = self._around(hide)
        return {**around, "messages": [self._message(message, hide) for message in self._messages[:end]]}

    # What is hidden: `leaf` stands for it.

    def _around(self, leaf: _Leaf) -> dict[str, Any]:
        variables = dict(self._variables)
        if tools := variables.get("tools"):
            variables["tools"] = [self._inside(tool, leaf, ("tools", at), "tool") for at, tool in enumerate(tools)]
        if documents := variables.get("documents"):
            variables["documents"] = self._inside(documents, leaf, ("documents",))
        return variables

    def _message(self, message: Any, leaf: _Leaf, path: Path = ()) -> dict[str, Any]:
        return {
            key: value if key == "role" else self._inside(value, leaf, (*path, key), key)
            for key, value in message.items()
        }

    def _inside(self, value: Any, leaf: _Leaf, path: Path, key: str = "") -> Any:
        if type(value) is str:
            return leaf(value, "text", path)
        if type(value) in (int, float):
            return leaf(value, "number", path) if "number" in self._traces.whole else value
        if isinstance(value, dict):
            if key in self._traces.whole:
                return leaf(value, key, path)
            return {name: self._inside(item, leaf, (*path, name), name) for name, item in value.items()}
        if type(value) is list:
            return [self._inside(item, leaf, (*path, at)) for at, item in enumerate(value)]
        return value
