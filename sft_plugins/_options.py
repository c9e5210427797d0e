"""What an option may be, and arguments checked: each rule said once, for functions, commands and configuration files.

one_of("overflow", "cut", ("raise", "drop"), PackingError)  →  [bad_option] overflow is 'cut'; expected one of 'raise', 'drop'
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

from sft_plugins.errors import SFTPluginsError

if TYPE_CHECKING:
    from datasets import Dataset

_Error = TypeVar("_Error", bound=SFTPluginsError)

TrainOn: TypeAlias = Literal["all", "last"]
Errors: TypeAlias = Literal["raise", "drop"]
HistoryRewrite: TypeAlias = Literal["split", "raise"]
SpecialTokens: TypeAlias = Literal["raise", "allow"]
Thinking: TypeAlias = Literal["auto", "default"]
Reasoning: TypeAlias = Literal["raise", "inline", "drop"]
Overflow: TypeAlias = Literal["raise", "drop", "truncate", "keep_turns"]


def words(kind: Any) -> tuple[str, ...]:
    """The words that an option of type `kind` may be; empty for any other type."""
    allowed = get_args(kind)
    return allowed if all(isinstance(word, str) for word in allowed) else ()


def bad_option(name: str, value: Any, expected: str, error: type[_Error], *, remedy: str | None = None) -> _Error:
    """The error for an option that is not what it may be."""
    return error(f"{name} is {value!r}; expected {expected}", code="bad_option", remedy=remedy or f"correct {name}")


def one_of(name: str, value: Any, allowed: Sequence[str], error: type[SFTPluginsError]) -> None:
    """Raises:
    SFTPluginsError: `bad_option`, naming what is allowed.
    """
    if not isinstance(value, str) or value not in allowed:
        raise bad_option(name, value, f"one of {', '.join(map(repr, allowed))}", error)


def whole_number(
    name: str,
    value: Any,
    error: type[SFTPluginsError],
    *,
    least: int = 1,
    most: int | None = None,
    also: str = "",
    code: str = "bad_option",
    remedy: str | None = None,
) -> int:
    """`value` as an int: Python's or NumPy's, not a bool, not a float.

    Raises:
        SFTPluginsError: `code`, for numbers outside `least` to `most` and for anything else; `also` is what the caller takes.
    """
    try:
        number = None if type(value).__name__ in ("bool", "bool_") else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        asked = f"from {least} on" if most is None else f"from {least} to {most}"
        message = f"{name} is {value!r}; expected an integer {asked}{also}"
        raise error(message, code=code, remedy=remedy or f"correct {name}")
    return number


def whole_number_or_none(name: str, value: Any, error: type[SFTPluginsError], *, least: int = 1) -> int | None:
    """`whole_number`, where None stands for no such limit."""
    return None if value is None else whole_number(name, value, error, least=least, also=", or None")


def stored_rows(
    dataset: Any, error: type[SFTPluginsError], *, call: str, stream: str, transforms: bool = False
) -> Dataset:
    """`dataset`, if it is a `datasets.Dataset` whose rows are those that it stores.

    Args:
        call: what the user has called, for the remedy: `"pack_dataset(dataset['train'], max_length)"`.
        stream: what to do with an IterableDataset.
        transforms: whether a transform does no harm, since rows are handed on with it.

    Raises:
        SFTPluginsError: `streaming_dataset`; `bad_schema` for several splits, for a transform, for anything else.
    """
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, IterableDataset):
        raise error(
            "the dataset is an IterableDataset, and all of its rows must be there",
            code="streaming_dataset",
            remedy=stream,
        )
    if isinstance(dataset, dict):  # DatasetDict among them
        raise error(
            f"got a {type(dataset).__name__} with splits {', '.join(map(str, dataset))}",
            code="bad_schema",
            remedy=f"take each split by itself, `{call}`",
        )
    if not isinstance(dataset, Dataset):
        raise error(
            f"got {type(dataset).__name__}; expected a datasets.Dataset",
            code="bad_schema",
            remedy="`Dataset.from_list(rows)` makes one of a list of rows",
        )
    if dataset.format["type"] == "custom" and not transforms:
        raise error(
            "the dataset has a transform (`set_transform`, `with_transform`), and rows are read as they are stored",
            code="bad_schema",
            remedy="give the function to `dataset.map`, or take it off with `dataset.with_format(None)`",
        )
    return dataset
