"""`MaskedExample`: one row to train on.

From the tokenizer to Arrow its tokens are arrays, views of those of a whole batch; lists are made where somebody reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class TokenList:
    """A field, `[T]`, given as a list or an array and read as a list, which replaces the array when it is first asked for."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, row: Any, owner: type | None = None) -> list[int]:
        if row is None:
            raise AttributeError(self.name)  # where dataclasses look for a default; there is none
        tokens = row.__dict__[self.name]
        if isinstance(tokens, np.ndarray):
            tokens = row.__dict__[self.name] = tokens.tolist()
        return tokens

    def __set__(self, row: Any, tokens: list[int] | np.ndarray) -> None:
        row.__dict__[self.name] = tokens

    def array(self, row: Any) -> np.ndarray:
        """The field of `row` as an array, without a list where none has been asked for."""
        tokens = row.__dict__[self.name]
        return tokens if isinstance(tokens, np.ndarray) else np.array(tokens, np.int64)


@dataclass(frozen=True)
class MaskedExample:
    """One row to train on.

    Attributes:
        input_ids: token ids, `[T]`.
        labels: `[T]`, the id where it carries loss, −100 elsewhere; the first is always −100.
        role_tokens: tokens by origin: `trained`; untrained ones by role; `template` for what the template adds.
        repeated_tokens: prompt tokens that an earlier row of the same conversation holds as well (the price of a split).
        lost_tokens: tokens cut off by `overflow`, of which `lost_supervised` would have carried loss.
        turn_ends: for each supervised turn, where it ends in the row; empty where that is not known.
        modes: for each supervised turn, the mode of the template that gives its prompt; empty where it has one.
        changes: for each supervised turn, what was done so that it is exact: `continued`, `reasoning_inlined`, …
        unread: keys of messages and switches that the chat template does not read; of a split row's rows the first has them.
    """

    input_ids: TokenList = TokenList()  # a descriptor, not a default
    labels: TokenList = TokenList()
    role_tokens: Mapping[str, int] = field(default_factory=dict)
    repeated_tokens: int = 0
    lost_tokens: int = 0
    lost_supervised: int = 0
    turn_ends: Sequence[int] = ()
    modes: Sequence[str] = ()
    changes: Sequence[Sequence[str]] = ()
    unread: Sequence[str] = ()

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `labels`, `[T]` each, int32 where they were made here, else int64."""
        fields = vars(MaskedExample)  # which a class made of it has only by inheritance
        return fields["input_ids"].array(self), fields["labels"].array(self)
