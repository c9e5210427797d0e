"""What cannot be packed, each said once: the errors that `pack_dataset` and `pack_stream` share, and their policies.

Invariant: every error has a stable code, and whatever concerns one row names it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import PackingError

OVERFLOW = ("raise", "drop", "truncate")
UNSUPERVISED = ("raise", "drop")
EXTRA_COLUMNS = ("raise", "drop", "carry")


def check_policies(*, overflow: str, unsupervised: str, extra_columns: str) -> None:
    """Refuse a policy that nobody knows, naming those that are known."""
    for name, value, allowed in (
        ("overflow", overflow, OVERFLOW),
        ("unsupervised", unsupervised, UNSUPERVISED),
        ("extra_columns", extra_columns, EXTRA_COLUMNS),
    ):
        if value not in allowed:
            raise PackingError(f"{name} is {value!r}; expected one of {', '.join(allowed)}", code="bad_option")


def already_packed() -> PackingError:
    return PackingError(
        "the rows are packed already: they have `seq_lengths`",
        code="already_packed",
        remedy="pack the rows that those were made from",
    )


def missing_column(name: str, found: Sequence[str], row: int | None = None) -> PackingError:
    return PackingError(
        f"there is no {name!r}; found {', '.join(found) or 'nothing'}",
        code="bad_schema",
        row=row,
        remedy="mask the rows first, {mask_dataset:`mask_dataset(dataset, PromptMasker(tokenizer))`}",
    )


def unknown_columns(extra: Sequence[str], row: int | None = None) -> PackingError:
    return PackingError(
        f"columns {', '.join(extra)} have no place in a packed row",
        code="extra_columns",
        row=row,
        remedy="extra_columns='drop' leaves them out, 'carry' keeps a list with one value per document",
    )


def length_mismatch(ids: int, labels: int, row: int) -> PackingError:
    return PackingError(f"{ids} input_ids and {labels} labels; expected as many", code="length_mismatch", row=row)


def empty_document(row: int) -> PackingError:
    return PackingError(
        "the document is empty", code="empty_document", row=row, remedy="filter out rows without tokens"
    )


def first_label(row: int, rows: int = 1) -> PackingError:
    return PackingError(
        f"the first label is not {IGNORE_INDEX} ({rows:,} such rows): packed, that token would be predicted from the "
        f"document before it",
        code="first_label",
        row=row,
        remedy=f"set `labels[0] = {IGNORE_INDEX}`; alone, the first token has nothing to be predicted from either",
    )


def too_long(length: int, capacity: int, row: int, rows: int = 1) -> PackingError:
    return PackingError(
        f"the document has {length:,} tokens and a packed row holds {capacity:,} ({rows:,} such rows)",
        code="overflow",
        row=row,
        remedy="raise {max_length}, or {shorten:choose overflow='drop' or 'truncate', which count what is lost}",
    )


def unsupervised_document(row: int, rows: int = 1) -> PackingError:
    return PackingError(
        f"every label is {IGNORE_INDEX} ({rows:,} such rows): the document trains nothing",
        code="no_supervised_tokens",
        row=row,
        remedy="find out why masking left nothing, or choose {unsupervised:unsupervised='drop'}, which counts them",
    )


def padded_row(row: int) -> PackingError:
    return PackingError(
        "attention_mask is not one 1 per token: the row is padded, and packed its padding would be context",
        code="padded_row",
        row=row,
        remedy="tokenise without padding",
    )
