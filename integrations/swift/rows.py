"""Tokenised rows past ms-swift's template, which would tokenise conversations; all other rows as ever.

    {input_ids, labels, lengths}  →  Template.encode  →  the same ids and labels        {messages, …}  →  ms-swift's own way

Invariant: a row of ours is collated only for a trainer that `callback.py` looks at, and a packed row only by our collator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swift.template import Template

from sft_plugins.errors import MaskingError, PackingError, SFTPluginsError

_COLUMNS = ("input_ids", "labels", "seq_lengths")
_MARK = "sft_plugins"


class MaskedRow(dict[str, Any]):
    """A row that was tokenised and masked before ms-swift read it."""


def pass_rows_through() -> None:
    """Make `Template` hand on rows that are tokenised. Once is enough; a second call changes nothing.

    Raises:
        SFTPluginsError: `unsupported_version` where the two methods are not those of the releases known here.
    """
    if hasattr(Template.encode, _MARK):
        return
    for method, known in ((Template.encode, ("inputs", "return_template_inputs", "return_length")),
                          (Template.data_collator, ("batch", "padding_to"))):  # fmt: skip
        found = tuple(inspect.signature(method).parameters)[1:]
        if found != known:
            raise SFTPluginsError(
                f"ms-swift's Template.{method.__name__} takes {', '.join(found)}; known is {', '.join(known)}.",
                code="unsupported_version",
                remedy="Use a supported version of ms-swift (docs/ms-swift.md).",
            )
    Template.encode = _marked(_encode(Template.encode))
    Template.data_collator = _marked(_collate(Template.data_collator))


def _encode(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def encode(self: Any, inputs: Any, return_template_inputs: bool = False, return_length: bool = False) -> Any:
        if not isinstance(inputs, Mapping) or inputs.get("input_ids") is None or inputs.get("labels") is None:
            return theirs(self, inputs, return_template_inputs=return_template_inputs, return_length=return_length)
        row = MaskedRow({name: list(inputs[name]) for name in _COLUMNS if inputs.get(name) is not None})
        if return_length:
            row["lengths"] = [len(row["input_ids"])]
        return row

    return encode


def _collate(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def data_collator(self: Any, batch: Sequence[Any], *, padding_to: int | None = None) -> Any:
        ours = [row for row in batch if isinstance(row, MaskedRow)]
        if ours and not is_looked_at(self):
            raise MaskingError(
                "rows of sft-plugins are trained, and nothing looks at what becomes of them.",
                code="host_collator",
                remedy="Add `--callbacks sft_plugins` to the command.",
            )
        if any("seq_lengths" in row for row in ours):
            raise PackingError(
                "packed rows came to ms-swift's own collator, which reads each as one document.",
                code="prepacked_rows",
                remedy="Train one set of rows, packed or not, and leave `--packing` and `--padding_free` out.",
            )
        return theirs(self, batch, padding_to=padding_to)

    return data_collator


def look_at(template: Any) -> None:
    """Say that the trainer of `template` is looked at. On the template itself, which travels to workers."""
    setattr(template, _MARK, True)


def is_looked_at(template: Any) -> bool:
    return bool(vars(template).get(_MARK))


def _marked(method: Callable[..., Any]) -> Callable[..., Any]:
    setattr(method, _MARK, True)
    return method
