"""Every error this library raises: one base, one subclass per component, each with a stable `code`.

Messages say what happened, what was got, what was expected, where, and what to do about it. `code` is part of the public
API: reports count by it and scripts may branch on it.

A remedy names what only a host's user knows by another name in braces, and a host hands over its own names:

    "Raise {max_length}, or {no_watch:stop watching}"     Python: Raise max_length, or stop watching
                                                          a host: Raise `sequence_len`, or set `collapse: false`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_NAMED = re.compile(r"\{(?P<name>[a-z]\w*)(?::(?P<python>[^{}]*))?\}")
_Error = TypeVar("_Error", bound="SFTPluginsError")


class SFTPluginsError(ValueError):
    """Base class.

    Args:
        message: what happened, with what was got and what was expected.
        code: stable machine-readable name of the failure, for example `"overflow"`.
        row: index of the row in the user's data, where there is one.
        remedy: what the user can do about it; see above for names in braces.

    Attributes:
        remedy: the same in the words of a Python user.
    """

    # `code` has a default for torch alone: a DataLoader raises a worker's error again as `type(error)(text)`.
    def __init__(
        self, message: str, *, code: str = "in_worker", row: int | None = None, remedy: str | None = None
    ) -> None:
        self.message, self.code, self.row, self._remedy = message, code, row, remedy
        self.remedy = remedy = None if remedy is None else in_words(remedy)
        where = "" if row is None else f" (row {row})"
        super().__init__(f"[{code}]{where} {message}" + (f" Remedy: {remedy}" if remedy else ""))

    def at_row(self: _Error, row: int | None) -> _Error:
        """The same error, placed at `row`; None: at none."""
        return type(self)(self.message, code=self.code, row=row, remedy=self._remedy)

    def in_words(self: _Error, names: Mapping[str, str]) -> _Error:
        """The same error, its remedy in the words of a host: `names` has one for each name that a remedy may hold."""
        remedy = None if self._remedy is None else in_words(self._remedy, names)
        return type(self)(self.message, code=self.code, row=self.row, remedy=remedy)

    # Keyword-only arguments do not survive the default pickling of exceptions; `datasets.map(num_proc=…)` and
    # DataLoader workers send them between processes.
    def __reduce__(self) -> tuple[Callable[..., SFTPluginsError], tuple[Any, ...]]:
        return _rebuild, (type(self), self.message, self.code, self.row, self._remedy)


def in_words(remedy: str, names: Mapping[str, str] | None = None) -> str:
    """`remedy` with every name in braces as `names` has it; without, in the words of a Python user."""
    return _NAMED.sub(lambda found: (names or {}).get(found["name"], found["python"] or found["name"]), remedy)


class MaskingError(SFTPluginsError):
    """A row cannot be masked exactly."""


class PackingError(SFTPluginsError):
    """Documents cannot be packed as asked."""


class ContaminationError(SFTPluginsError):
    """Documents of a packed row can see one another, or it cannot be shown that they cannot."""


class CollapseError(SFTPluginsError):
    """The collapse callback cannot be set up as asked."""


class AssetError(SFTPluginsError):
    """A model, a data file, a configuration or a package that a check needs is missing or unreadable."""


def _rebuild(
    cls: type[SFTPluginsError], message: str, code: str, row: int | None, remedy: str | None
) -> SFTPluginsError:
    return cls(message, code=code, row=row, remedy=remedy)
