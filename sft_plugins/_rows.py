"""A tokenised row: its arrays, its documents, and the rules that it keeps. The caller names the class of the error.

Rules are checked in batch form, rows end to end and the tokens of each, at the price of one pass over them all:

    input_ids   1   5   6   2 | 1   8   2          lengths 4, 3          1 = BOS, 2 = stop
    labels    −100 −100  6  2 | −100  8  2         labels are −100 or the id, the first is −100, one at least carries loss
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import SFTPluginsError

Error = TypeVar("Error", bound=SFTPluginsError)


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """What a row may hold.

    Attributes:
        vocabulary_size: ids are below it.
        bos_token_id: not twice at the beginning; None: the tokenizer has none.
        stop_token_ids: supervised runs end on one of them; None: stops are not checked.
        supervised: whether every row has a supervised token, none of them its first.
    """

    vocabulary_size: int
    bos_token_id: int | None = None
    stop_token_ids: frozenset[int] | None = None
    supervised: bool = True


# ---- Arrays ----


def integers(value: Any, name: str, error: type[SFTPluginsError], *, booleans: bool = False) -> np.ndarray:
    """`value` (list, array or tensor) as `[T]` of its own integer type; booleans, where they are allowed, as 0 and 1.

    Raises:
        SFTPluginsError: `bad_schema`.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as reason:  # lists of unequal lengths; a tensor that needs a gradient
        raise _not_integers(name, str(reason), error) from reason
    if array.ndim != 1 or (array.size and array.dtype.kind not in ("iub" if booleans else "iu")):
        raise _not_integers(name, f"{array.ndim}-D {array.dtype}", error)
    # An empty list is float64, and NumPy joins uint64 with int64 to float64.
    return array.astype(np.int64) if array.dtype.kind not in "iu" or array.dtype == np.uint64 else array


def document_lengths(value: Any, tokens: int, error: type[SFTPluginsError]) -> np.ndarray:
    """`seq_lengths` of a row of `tokens`, int64 `[N]`.

    Raises:
        SFTPluginsError: `bad_schema`, `boundaries`.
    """
    lengths = integers(value, "seq_lengths", error).astype(np.int64, copy=False)
    if not lengths.size or lengths.min() < 1 or lengths.sum() != tokens:
        raise error(
            f"documents of {lengths.tolist()[:8]} tokens do not fill a row of {tokens}; expected positive lengths that add "
            "up to it",
            code="boundaries",
            remedy="seq_lengths holds the tokens of each document; take the rows as pack_dataset made them",
        )
    return lengths


# ---- Faults of one row that need no rules ----


def already_packed(row: Mapping[str, Any] | Collection[str], error: type[Error]) -> Error | None:
    """The error of a row, or of the columns of a data set, that says where its documents end where it must be one document."""
    if "seq_lengths" not in row or (isinstance(row, Mapping) and row["seq_lengths"] is None):
        return None
    return error(
        "the rows are packed already: they have `seq_lengths`",
        code="already_packed",
        remedy="take the rows that those were made from; packed rows are for BlockDiagonalPackingCollator, rows='packed'",
    )


def length_mismatch(name: str, got: int, tokens: int, error: type[Error]) -> Error:
    return error(
        f"{tokens} input_ids and {got} {name}; expected as many",
        code="length_mismatch",
        remedy="tokenise both in one pass: one label per token, the id where it carries loss, -100 elsewhere",
    )


def first_label(error: type[Error], rows: int = 1) -> Error:
    return error(
        f"the first label is not {IGNORE_INDEX} ({rows:,} such rows): nothing comes before that token to predict it from; "
        "packed, it would be predicted from the document before it",
        code="first_label",
        remedy=f"set `labels[0] = {IGNORE_INDEX}`; were prompt tokens meant to be trained?",
    )


def no_supervised_tokens(tokens: int, error: type[Error], rows: int = 1) -> Error:
    return error(
        f"every label is {IGNORE_INDEX} ({rows:,} such rows): none of the row's {tokens:,} tokens carries loss",
        code="no_supervised_tokens",
        remedy="find out why masking or truncation left nothing, or let mask_dataset or pack_dataset drop and count such rows",
    )


# ---- Rules in batch form ----


def first_fault(
    ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, rules: RowRules, error: type[Error]
) -> Error | None:
    """The first row that breaks a rule, as an error with its number in `row`; None if every row keeps all of them.

    Args:
        ids, labels: `[T]`, the rows end to end; lengths: `[R]`, tokens of each.
    """
    rows = _Rows(ids, labels, np.asarray(lengths, np.int64), rules)
    faults = [fault for check in rows.checks() if (fault := check())]
    if not faults:
        return None
    found = min(faults, key=lambda fault: fault.row)  # of one row the rule that stands first
    return error(found.message, code=found.code, row=found.row, remedy=found.remedy)


def supervised_runs(labels: np.ndarray) -> np.ndarray:
    """Half-open spans of consecutive supervised positions: int64 `[R, 2]` of `[start, end)`."""
    supervised = np.concatenate(([False], np.asarray(labels) != IGNORE_INDEX, [False])).astype(np.int8)
    return np.flatnonzero(np.diff(supervised)).reshape(-1, 2)


def missing_stop_runs(ids: np.ndarray, labels: np.ndarray, stop_token_ids: Collection[int]) -> np.ndarray:
    """The supervised runs, `[R, 2]`, whose last id is no stop token."""
    runs = supervised_runs(labels)
    return runs[~np.isin(ids[runs[:, 1] - 1], list(stop_token_ids))] if len(runs) else runs


class _Fault(NamedTuple):
    row: int
    code: str
    message: str
    remedy: str | None


class _Rows:
    """Rows end to end, with where each begins and ends."""

    def __init__(self, ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, rules: RowRules) -> None:
        self.ids, self.labels, self.lengths, self.rules = ids, labels, lengths, rules
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths
        self.supervised = labels != IGNORE_INDEX

    def checks(self) -> list[Callable[[], _Fault | None]]:
        checks = [self.ids_exist, self.labels_are_ids]
        checks += [self.something_is_supervised, self.first_is_not] if self.rules.supervised else []
        checks += [self.one_bos] if self.rules.bos_token_id is not None else []
        checks += [self.runs_end_on_stops] if self.rules.stop_token_ids is not None else []
        return checks

    def first(self, wrong: np.ndarray) -> tuple[int, int, int] | None:
        """(row, its position there, its position in all) of the first token that is wrong."""
        if not wrong.any():
            return None
        at = int(np.argmax(wrong))
        row = int(np.searchsorted(self.ends, at, side="right"))
        return row, at - int(self.starts[row]), at

    def ids_exist(self) -> _Fault | None:
        found = self.first((self.ids < 0) | (self.ids >= self.rules.vocabulary_size))
        if found is None:
            return None
        row, place, at = found
        message = f"input_ids[{place}] = {int(self.ids[at])} is not in the vocabulary [0, {self.rules.vocabulary_size})"
        remedy = "tokenise with the tokenizer of the model that is trained, or resize the model's embeddings"
        return _Fault(row, "id_out_of_range", message, remedy)

    def labels_are_ids(self) -> _Fault | None:
        found = self.first(self.supervised & (self.labels != self.ids))
        if found is None:
            return None
        row, place, at = found
        got = f"labels[{place}] = {int(self.labels[at])}, but input_ids[{place}] = {int(self.ids[at])}"
        remedy = "do not shift labels: the model's loss shifts them"
        return _Fault(row, "label_mismatch", f"{got}; a label is the id or {IGNORE_INDEX}", remedy)

    def something_is_supervised(self) -> _Fault | None:
        before = np.concatenate(([0], np.cumsum(self.supervised)))
        barren = before[self.ends] == before[self.starts]
        if not barren.any():
            return None
        row = int(np.argmax(barren))
        fault = no_supervised_tokens(int(self.lengths[row]), SFTPluginsError)
        return _Fault(row, fault.code, fault.message, fault.remedy)

    def first_is_not(self) -> _Fault | None:
        wrong = np.zeros(len(self.ids), np.bool_)
        starts = self.starts[self.lengths > 0]
        wrong[starts] = self.supervised[starts]
        found = self.first(wrong)
        fault = first_label(SFTPluginsError)
        return found and _Fault(found[0], fault.code, fault.message, fault.remedy)

    def one_bos(self) -> _Fault | None:
        starts = self.starts[self.lengths > 1]
        wrong = np.zeros(len(self.ids), np.bool_)
        wrong[starts] = (self.ids[starts] == self.rules.bos_token_id) & (
            self.ids[starts + 1] == self.rules.bos_token_id
        )
        found = self.first(wrong)
        message = f"the row begins with BOS (id {self.rules.bos_token_id}) twice"
        remedy = "the template writes one and the tokenizer adds another: tokenise with add_special_tokens=False"
        return found and _Fault(found[0], "double_bos", message, remedy)

    def runs_end_on_stops(self) -> _Fault | None:
        stops = self.rules.stop_token_ids or frozenset()
        labels = self.labels.copy()
        labels[self.starts[self.lengths > 0]] = IGNORE_INDEX  # so that no run goes on into the next row
        runs = missing_stop_runs(self.ids, labels, stops)
        if not len(runs):
            return None
        start, end = map(int, runs[0])
        row = int(np.searchsorted(self.ends, end - 1, side="right"))
        first = int(self.starts[row])
        message = (
            f"the supervised tokens [{start - first}, {end - first}) end on id {int(self.ids[end - 1])}, which does not stop "
            f"generation (stop ids: {sorted(stops)})"
        )
        remedy = "supervise the end-of-turn token and nothing after it, or pass its id in `stop_token_ids`"
        return _Fault(row, "missing_stop", message, remedy)


def _not_integers(name: str, got: str, error: type[Error]) -> Error:
    return error(
        f"{name} must be a flat list of integers, got {got}",
        code="bad_schema",
        remedy="pass lists, NumPy arrays or tensors of one dimension; text is masked first, "
        "`mask_dataset(dataset, PromptMasker(tokenizer))`",
    )
