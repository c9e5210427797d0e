"""A tokenised row: its arrays, its documents, and the rules that it keeps. The caller names the class of the error.

Rules are checked in batch form, rows end to end and the tokens of each, at the price of one pass over them all:

    input_ids   1   5   6   2 | 1   8   2          lengths 4, 3          1 = BOS, 2 = stop
    labels    −100 −100  6  2 | −100  8  2         labels are −100 or the id, the first is −100, one at least carries loss
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import SFTPluginsError

Error = TypeVar("Error", bound=SFTPluginsError)

TREE_COLUMNS = ("seq_depths", "seq_parents")
"""Columns of a packed row, and keys of a batch, that say which documents are branches of which."""


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
        raise _not_integers(name, f"{array.ndim} dimensions of {array.dtype}", error)
    # An empty list is float64, and NumPy joins uint64 with int64 to float64.
    return array.astype(np.int64) if array.dtype.kind not in "iu" or array.dtype == np.uint64 else array


class Segments(NamedTuple):
    """The documents of a packed row, in order; those of trees may be branches of earlier ones. int64 `[N]` each.

    Attributes:
        lengths: tokens of its own. depths: tokens of its parent's path that it sees. parents: number of the document that it
            branches from, -1 of a root. A branch's first token is its parent's at the fork, repeated.
    """

    lengths: np.ndarray
    depths: np.ndarray
    parents: np.ndarray

    @property
    def branched(self) -> bool:
        return bool((self.parents >= 0).any() or self.depths.any())

    def fault(self) -> str | None:
        """What is wrong with the first branch that hangs on nothing."""
        branch, of = self.parents >= 0, np.clip(self.parents, 0, self.lengths.size - 1)
        bad = (self.parents < -1) | (self.parents >= np.arange(self.lengths.size))
        bad |= np.where(branch, self.depths < self.depths[of], self.depths != 0)
        # The parent's token at the fork is repeated, so it has one there.
        bad |= branch & (self.depths >= (self.depths + self.lengths)[of])
        if not bad.any():
            return None
        one = int(np.argmax(bad))
        return (
            f"document {one} branches from document {self.parents[one]} at depth {self.depths[one]}, which is no place "
            "in an earlier document's own tokens"
        )

    def paths(self) -> list[np.ndarray]:
        """For each document the packed positions that its last token sees."""
        found: list[np.ndarray] = []
        starts = np.cumsum(self.lengths) - self.lengths
        for start, length, depth, parent in zip(starts, self.lengths, self.depths, self.parents, strict=True):
            own = np.arange(start, start + length)
            found.append(own if parent < 0 else np.concatenate((found[parent][:depth], own)))
        return found


def read_segments(row: Mapping[str, Any], ids: np.ndarray, error: type[SFTPluginsError]) -> Segments:
    """What `seq_lengths`, and of trees `seq_depths` and `seq_parents`, say of a packed row of `ids`.

    Raises:
        SFTPluginsError: `bad_schema`, `length_mismatch`, `boundaries`.
    """
    # Rows packed without trees beside rows with them have nulls there; lengths that add up are those of plain documents.
    if all(row.get(name) is None for name in TREE_COLUMNS):
        lengths = document_lengths(row["seq_lengths"], ids.size, error)
        return Segments(lengths, np.zeros_like(lengths), np.full_like(lengths, -1))
    if missing := [name for name in ("seq_lengths", *TREE_COLUMNS) if row.get(name) is None]:
        raise error(
            f"the row has no {' and no '.join(missing)}, so where its branches begin is lost",
            code="bad_schema",
            remedy="remove_unused_columns=False keeps the columns",
        )
    ends, depths, parents = (
        integers(row[name], name, error).astype(np.int64) for name in ("seq_lengths", *TREE_COLUMNS)
    )
    if not ends.size == depths.size == parents.size:
        raise length_mismatch("documents in seq_parents", parents.size, ends.size, error)
    segments = Segments(document_lengths(ends - depths, ids.size, error), depths, parents)
    fault = segments.fault()
    if fault is None:
        paths, starts = segments.paths(), np.cumsum(segments.lengths) - segments.lengths
        for fork in np.flatnonzero(parents >= 0):
            if ids[starts[fork]] != ids[paths[parents[fork]][depths[fork]]]:
                fault = (
                    f"document {fork} does not begin with the token of document {parents[fork]} at which it branches"
                )
                break
    if fault is not None:
        raise error(fault, code="boundaries", remedy="take the rows as pack_dataset made them")
    return segments


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
            remedy="seq_lengths holds the tokens of each document; take the rows as pack_dataset made them, and of trees "
            "(share_prefixes) keep the columns seq_parents and seq_depths",
        )
    return lengths


# ---- Faults of one row that need no rules ----


def already_packed(row: Mapping[str, Any] | Collection[str], error: type[Error]) -> Error | None:
    """The error of a row, or of the columns of a data set, that says where its documents end where it must be one document."""
    names = ("seq_lengths", *TREE_COLUMNS)
    found = [name for name in names if name in row and not (isinstance(row, Mapping) and row[name] is None)]
    if not found:
        return None
    return error(
        f"the rows are packed already: they have `{found[0]}`",
        code="already_packed",
        remedy="take the rows that those were made from; packed rows are for BlockDiagonalPackingCollator(rows='packed')",
    )


def length_mismatch(name: str, got: int, tokens: int, error: type[Error]) -> Error:
    return error(
        f"{tokens} input_ids and {got} {name}; expected as many",
        code="length_mismatch",
        remedy="tokenise both in one pass: one label per token, the id where it carries loss, -100 elsewhere",
    )


def first_label(error: type[Error], rows: int = 1) -> Error:
    return error(
        f"the first label is not {IGNORE_INDEX}{_such(rows)}: nothing comes before the first token to predict it from; packed, "
        "it would be predicted from the document before it",
        code="first_label",
        remedy=f"set `labels[0] = {IGNORE_INDEX}`; were prompt tokens meant to be trained?",
    )


def no_supervised_tokens(tokens: int, error: type[Error], rows: int = 1, *, remedy: str | None = None) -> Error:
    return error(
        f"every label is {IGNORE_INDEX}{_such(rows)}: none of the row's {tokens:,} tokens carries loss",
        code="no_supervised_tokens",
        remedy=remedy or "drop such rows, each counts as loss 0.0, or check the mask and the truncation that made them",
    )


def _such(rows: int) -> str:
    return f" ({rows:,} such rows)" if rows > 1 else ""


# ---- Rules in batch form ----


def first_fault(
    ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, rules: RowRules, error: type[Error]
) -> Error | None:
    """The first row that breaks a rule, as an error with its number in `row`; None if every row keeps all of them.

    Args:
        ids, labels: `[T]`, the rows end to end; lengths: `[R]`, tokens of each.
    """
    rows = _Rows(ids, labels, np.asarray(lengths, np.int64), rules, error)
    faults = [fault for check in rows.checks() if (fault := check())]
    return min(faults, key=lambda fault: fault.row or 0, default=None)  # of one row the rule that stands first


def supervised_runs(labels: np.ndarray) -> np.ndarray:
    """Half-open spans of consecutive supervised positions: int64 `[R, 2]` of `[start, end)`."""
    supervised = np.concatenate(([False], np.asarray(labels) != IGNORE_INDEX, [False])).astype(np.int8)
    return np.flatnonzero(np.diff(supervised)).reshape(-1, 2)


def missing_stop_runs(ids: np.ndarray, labels: np.ndarray, stop_token_ids: Collection[int]) -> np.ndarray:
    """The supervised runs, `[R, 2]`, whose last id is no stop token."""
    runs = supervised_runs(labels)
    return runs[~np.isin(ids[runs[:, 1] - 1], list(stop_token_ids))] if len(runs) else runs


class _Rows(Generic[Error]):
    """Rows end to end, with where each begins and ends. Each check finds the first row that breaks its rule."""

    def __init__(
        self, ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, rules: RowRules, error: type[Error]
    ) -> None:
        self.ids, self.labels, self.lengths, self.rules, self.error = ids, labels, lengths, rules, error
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths
        self.supervised = labels != IGNORE_INDEX

    def checks(self) -> list[Callable[[], Error | None]]:
        checks = [self.ids_exist, self.labels_are_ids]
        checks += [self.something_is_supervised, self.first_is_not] if self.rules.supervised else []
        checks += [self.one_bos] if self.rules.bos_token_id is not None else []
        checks += [self.runs_end_on_stops] if self.rules.stop_token_ids is not None else []
        return checks

    def row_of(self, token: int) -> int:
        return int(np.searchsorted(self.ends, token, side="right"))

    def ids_exist(self) -> Error | None:
        wrong = (self.ids < 0) | (self.ids >= self.rules.vocabulary_size)
        if not wrong.any():
            return None
        at = int(np.argmax(wrong))
        row = self.row_of(at)
        return self.error(
            f"input_ids[{at - self.starts[row]}] = {int(self.ids[at])} is not in the vocabulary "
            f"[0, {self.rules.vocabulary_size})",
            code="id_out_of_range",
            row=row,
            remedy="tokenise with the tokenizer of the model that is trained, or resize the model's embeddings",
        )

    def labels_are_ids(self) -> Error | None:
        wrong = self.supervised & (self.labels != self.ids)
        if not wrong.any():
            return None
        at = int(np.argmax(wrong))
        row = self.row_of(at)
        place = at - self.starts[row]
        return self.error(
            f"labels[{place}] = {int(self.labels[at])}, but input_ids[{place}] = {int(self.ids[at])}; a label is the id or "
            f"{IGNORE_INDEX}",
            code="label_mismatch",
            row=row,
            remedy="do not shift labels: the model's loss shifts them",
        )

    def something_is_supervised(self) -> Error | None:
        before = np.concatenate(([0], np.cumsum(self.supervised)))
        barren = before[self.ends] == before[self.starts]
        row = int(np.argmax(barren))
        return no_supervised_tokens(int(self.lengths[row]), self.error).at_row(row) if barren.any() else None

    def first_is_not(self) -> Error | None:
        rows = np.flatnonzero(self.lengths)
        wrong = rows[self.supervised[self.starts[rows]]]
        return first_label(self.error).at_row(int(wrong[0])) if len(wrong) else None

    def one_bos(self) -> Error | None:
        rows = np.flatnonzero(self.lengths > 1)
        starts, bos = self.starts[rows], self.rules.bos_token_id
        wrong = rows[(self.ids[starts] == bos) & (self.ids[starts + 1] == bos)]
        if not len(wrong):
            return None
        return self.error(
            f"the row begins with BOS (id {bos}) twice",
            code="double_bos",
            row=int(wrong[0]),
            remedy="the template writes one and the tokenizer adds another: tokenise with add_special_tokens=False",
        )

    def runs_end_on_stops(self) -> Error | None:
        stops = self.rules.stop_token_ids or frozenset()
        labels = self.labels.copy()
        labels[self.starts[self.lengths > 0]] = IGNORE_INDEX  # so that no run goes on into the next row
        runs = missing_stop_runs(self.ids, labels, stops)
        if not len(runs):
            return None
        start, end = map(int, runs[0])
        row = self.row_of(end - 1)
        first = int(self.starts[row])
        return self.error(
            f"the supervised tokens [{start - first}, {end - first}) end on id {int(self.ids[end - 1])}, which does not stop "
            f"generation (stop ids: {sorted(stops)})",
            code="missing_stop",
            row=row,
            remedy="supervise the end-of-turn token and nothing after it, or {its_stop_token:pass its id in `stop_token_ids`}",
        )


def _not_integers(name: str, got: str, error: type[Error]) -> Error:
    return error(
        f"{name} must be a flat list of integers, got {got}",
        code="bad_schema",
        remedy="pass lists, NumPy arrays or tensors of one dimension; text is masked first, "
        "{mask_dataset:`mask_dataset(dataset, PromptMasker(tokenizer))`}",
    )
