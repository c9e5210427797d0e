"""Jinja run on hidden values: what a template does with one is noted, or stops the run.

Filters, tests, look-ups and calls are known, here by name, or refused. Operators need no list: hidden values have those that
can be followed, and Python raises for the others.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import BuiltinMethodType
from typing import Any

from jinja2.environment import Template
from jinja2.ext import Extension
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import safe_range
from markupsafe import Markup

from sft_plugins.masking.rendering.environment import PLAIN, quick_environment
from sft_plugins.masking.rendering.hidden import (
    TAPE,
    Hidden,
    Method,
    NotFollowedError,
    Safe,
    Tape,
    Text,
    Whole,
    joined,
)

# Filters that hand values on, and look at nothing of a text but whether there is one.
_HANDING_ON = frozenset({
    "list", "first", "last", "map", "select", "selectattr", "reject", "rejectattr", "default", "d", "items", "dictsort",
})  # fmt: skip
# Filters that make a text of a text, and of nothing else.
_MAKING = frozenset({"trim", "lower", "upper", "capitalize", "title", "indent"})
_BY_CHANCE = frozenset({"random"})
# Tests of a value's type.
_OF_TYPE = frozenset({
    "defined", "undefined", "none", "boolean", "true", "false", "integer", "float", "number", "string", "mapping", "sequence",
    "iterable", "callable",
})  # fmt: skip
_COMPARING = frozenset({"eq", "==", "equalto", "ne", "!=", "in"})
_OF_JINJA = frozenset({"_loop_vars", "_block_vars"})  # which every call is given
_KEYS = (str, int, bool, type(None))
_MARK = "Zhidden{}neddihZ"
_MARKS = re.compile('"' + _MARK.format(r"(\d+)") + '"')


@functools.lru_cache(maxsize=32)
def following(source: str) -> Template:
    """`source` compiled for hidden values; what it writes is a string, or a `Text` where hidden ones stand in it."""
    quick = quick_environment(source)

    class Traced(type(quick)):  # type: ignore[misc]
        def getattr(self, obj: Any, attribute: str) -> Any:
            if isinstance(obj, (Hidden, Method)):
                return self._of_hidden(obj, attribute)
            return super().getattr(obj, attribute)

        def getitem(self, obj: Any, argument: Any) -> Any:
            parts = (argument.start, argument.stop, argument.step) if type(argument) is slice else (argument,)
            if not all(type(part) in _KEYS for part in parts):
                raise NotFollowedError("a key is hidden")  # which Jinja would take for one that is not there
            if not isinstance(obj, (Hidden, Method)):
                return super().getitem(obj, argument)
            if type(argument) is slice and type(obj) is Text:
                return obj.cut(argument)
            return self._of_hidden(obj, argument)

        def _of_hidden(self, obj: Hidden | Method, attribute: Any) -> Any:
            if type(obj) is Whole:
                obj.look()
            # What begins with `_` the sandbox calls undefined, whether strings have it or not.
            if type(obj) is not Text or type(attribute) is not str or attribute[:1] == "_":
                raise NotFollowedError(f"{attribute!r} of a hidden value")
            return obj.method(attribute) if hasattr(str, attribute) else self.undefined(obj="", name=attribute)

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            if type(function) is Method:
                return function(*args, **{name: value for name, value in kwargs.items() if name not in _OF_JINJA})
            if function is self.globals.get("strftime_now"):
                return _now(context.resolve(TAPE), function, *args)
            owner, builtin = getattr(function, "__self__", None), type(function) is BuiltinMethodType
            if builtin and type(owner) is str and any(isinstance(arg, Hidden) for arg in args):
                raise NotFollowedError(f"{function.__name__} of hidden arguments")
            if builtin and type(owner) is str and function.__name__ == "join":
                return _together(owner, *args)
            known = type(owner) in (str, dict, list, tuple) if builtin else isinstance(owner, (LoopContext, Extension))
            if known or type(function) is Macro or self._is_own(function):
                return super().call(context, function, *args, **kwargs)
            raise NotFollowedError(f"call of {function!r}")

        def _is_own(self, function: Any) -> bool:
            own = [self.globals.get(name) for name in ("namespace", "dict", "raise_exception")]
            return function is safe_range or any(function is one for one in own)

        def concat(self, pieces: Any) -> Any:
            return joined(*pieces)

    traced = quick.overlay()
    traced.__class__ = Traced
    traced.filters = {name: _filter(name, own) for name, own in quick.filters.items()}
    traced.tests = {name: _test(name, own) for name, own in quick.tests.items()}
    # Compiled templates write with `str`, and `~` with `str_join`.
    module: dict[str, Any] = {"environment": traced, "__file__": "<template>", "str": _written}
    exec(traced.compile(source), module)
    module["str_join"] = lambda pieces: joined(*map(_written, pieces))
    return Template._from_namespace(traced, module, traced.globals)


def _written(value: Any) -> Any:
    """`str(value)`."""
    if type(value) is Whole:
        return value.made(str)
    if type(value) is Safe:
        return Text(value.tape, *value.parts)
    if type(value) is Text:
        return value
    if not _is_printable(value):
        raise NotFollowedError(f"{type(value).__name__} is written")
    return str(value)


def _is_printable(value: Any) -> bool:
    """Whether Python writes it the same wherever in memory it is."""
    if isinstance(value, dict):
        return all(_is_printable(one) for pair in value.items() for one in pair)
    if type(value) in (list, tuple):
        return all(map(_is_printable, value))
    return type(value) in PLAIN or isinstance(value, (Undefined, Markup))


def _now(tape: Tape, strftime_now: Callable[[str], str], form: str) -> Text:
    """The time of day, which is asked for anew wherever a trace is used."""
    return Text(tape, tape.book.number(strftime_now, (), (form,)))


def _together(separator: str, values: Any) -> Any:
    """`separator.join(values)`."""
    pieces = list(values)
    if all(type(piece) is str for piece in pieces):
        return separator.join(pieces)
    if any(type(piece) not in (str, Text) for piece in pieces):
        raise NotFollowedError("join")
    return joined(*[part for piece in pieces for part in (separator, piece)][1:])


def _filter(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    first = int(hasattr(own, "jinja_pass_arg"))  # the environment or a context comes before the value

    @functools.wraps(own)
    def traced(*args: Any, **kwargs: Any) -> Any:
        value, *others = args[first:]
        if type(value) is Whole and name not in ("tojson", "default", "d", "string"):
            value.look()
        if name in _HANDING_ON:
            return own(*args, **kwargs)
        if any(isinstance(other, Hidden) for other in (*others, *kwargs.values())):
            raise NotFollowedError(f"{name} of hidden arguments")
        if name == "tojson":
            return _as_json(own, value, others, kwargs)
        if name == "join" and not kwargs and len(others) < 2:
            return _together(others[0] if others else "", map(_written, value))
        if name == "string":
            return _written(value)
        if type(value) is Text:
            if name == "safe":
                return Safe(value.tape, *value.parts)
            if name in ("length", "count"):
                return value.length()
            if name == "replace" and not kwargs:
                return value.method("replace")(*others)
            if name in _MAKING and not kwargs:
                return value.made(own, *others)
        if name not in _BY_CHANCE and (type(value) in PLAIN or name in ("length", "count")):
            return own(*args, **kwargs)
        raise NotFollowedError(name)

    return traced


def _test(name: str, own: Any) -> Callable[..., Any]:
    @functools.wraps(own)
    def traced(*args: Any) -> Any:
        if any(isinstance(other, Hidden) for other in args[1:]) and name not in _COMPARING:
            raise NotFollowedError(f"{name} of hidden arguments")
        if not isinstance(args[0], Hidden) or name in _COMPARING:
            return own(*args)
        if name in _OF_TYPE:
            return own(args[0].example)
        raise NotFollowedError(name)

    return traced


def _as_json(own: Callable[..., Any], value: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """`own(value, *args, **kwargs)`: text in which each hidden value is written as it is written alone."""
    found: list[Hidden] = []

    def marked(item: Any) -> Any:
        if isinstance(item, Hidden):
            found.append(item)
            return _MARK.format(len(found) - 1)
        if isinstance(item, dict):
            return {key: marked(one) for key, one in item.items()}
        return [marked(one) for one in item] if type(item) in (list, tuple) else item

    text = own(marked(value), *args, **kwargs)
    if (args or kwargs.get("indent")) and any(type(one) is Whole and one is not value for one in found):
        raise NotFollowedError("a layout depends on the depth")
    options = (tuple(args), tuple(kwargs.items()))
    pieces = _MARKS.split(text)
    if sorted(pieces[1::2], key=int) != [str(index) for index in range(len(found))]:
        raise NotFollowedError("a text that looks like a mark")
    made = [
        found[int(piece)].made(as_json, own, *options) if index % 2 else piece for index, piece in enumerate(pieces)
    ]
    return joined(*made)


def as_json(value: Any, own: Callable[..., Any], args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> str:
    """A hidden value as the filter `own` writes it, all of it."""
    return own(value, *args, **dict(kwargs))
