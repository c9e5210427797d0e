"""The four invariants of a masked row, each checked by code that did not make the row.

    input_ids   1   5   6   2   7   8   2          1 = BOS, 2 = stop
    labels    −100 −100 −100 −100 7   8   2        one supervised run, [4, 7), that ends on a stop token

Structure (`check_rows`): labels are −100 or the id, the first is −100, every id exists, at least one token carries loss,
BOS stands once. Stop (`missing_stop_runs`): every supervised run ends on an id that stops generation. Coverage
(`required_texts`, `first_missing`): the turn's text holds the data's own text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import MaskingError
from sft_plugins.masking.examples.messages import Message, content_text, reasoning_texts, tool_call_texts

_THINK_TAG = re.compile(r"</?think>|</?seed:think>|\[/?THINK\]")


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """What ids a row may hold. `bos_token_id` None: the tokenizer has none; `stop_token_ids` None: stops are not checked."""

    vocabulary_size: int
    bos_token_id: int | None = None
    stop_token_ids: frozenset[int] | None = None


def supervised_runs(labels: np.ndarray) -> np.ndarray:
    """Half-open spans of consecutive supervised positions: int64 `[R, 2]` of `[start, end)`."""
    supervised = np.concatenate(([False], np.asarray(labels) != IGNORE_INDEX, [False])).astype(np.int8)
    return np.flatnonzero(np.diff(supervised)).reshape(-1, 2)


def find_violation(ids: np.ndarray, labels: np.ndarray, rules: RowRules) -> MaskingError | None:
    """The first invariant that one row (int64 `[T]` each) breaks, or None."""
    if len(ids) != len(labels):
        return MaskingError(
            f"`labels` has {len(labels)} entries, `input_ids` has {len(ids)}.",
            code="length_mismatch",
            remedy="Give one label per token: the id where it carries loss, -100 elsewhere.",
        )
    outside = np.flatnonzero((ids < 0) | (ids >= rules.vocabulary_size))
    if outside.size:
        at = int(outside[0])
        return MaskingError(
            f"input_ids[{at}] = {int(ids[at])} is not in the vocabulary [0, {rules.vocabulary_size}).",
            code="id_out_of_range",
            remedy="Tokenise with the tokenizer of the model that is trained.",
        )
    supervised = labels != IGNORE_INDEX
    wrong = np.flatnonzero(supervised & (labels != ids))
    if wrong.size:
        at = int(wrong[0])
        return MaskingError(
            f"labels[{at}] = {int(labels[at])}, but input_ids[{at}] = {int(ids[at])}; a label is the id or -100.",
            code="label_mismatch",
            remedy="Do not shift labels: the model shifts them itself.",
        )
    if not supervised.any():
        return MaskingError(
            f"none of the row's {len(ids)} tokens carries loss.",
            code="no_supervised_tokens",
            remedy="Such a row counts as loss 0.0; drop it, or check the mask and the truncation that made it.",
        )
    if supervised[0]:
        return MaskingError(
            "the first token carries loss, but nothing comes before it to predict it from.",
            code="first_label",
            remedy="The first label of a document is -100. Were prompt tokens meant to be trained?",
        )
    if rules.bos_token_id is not None and len(ids) > 1 and ids[0] == ids[1] == rules.bos_token_id:
        return MaskingError(
            f"the row begins with BOS (id {rules.bos_token_id}) twice.",
            code="double_bos",
            remedy="The template writes one and the tokenizer adds another: tokenise with add_special_tokens=False.",
        )
    if rules.stop_token_ids is not None:
        runs = missing_stop_runs(ids, labels, rules.stop_token_ids)
        if len(runs):
            start, end = map(int, runs[0])
            return MaskingError(
                f"the supervised tokens [{start}, {end}) end on id {int(ids[end - 1])}, which does not stop generation "
                f"(stop ids: {sorted(rules.stop_token_ids)}).",
                code="missing_stop",
                remedy="Supervise the end-of-turn token and nothing after it, or "
                "{its_stop_token:pass its id in `stop_token_ids`}.",
            )
    return None


def missing_stop_runs(ids: np.ndarray, labels: np.ndarray, stop_token_ids: Collection[int]) -> np.ndarray:
    """The supervised runs, `[R, 2]`, whose last id is no stop token."""
    runs = supervised_runs(labels)
    return runs[~np.isin(ids[runs[:, 1] - 1], list(stop_token_ids))] if len(runs) else runs


def required_texts(message: Message) -> list[list[str]]:
    """What the rendering of an assistant message must hold, as groups whose texts must appear in order.

    Content and reasoning count verbatim but for white space at their ends, and at the ends of the parts that a thinking
    tag divides them into; tool calls by name and by the leaves of their arguments.
    """
    groups = [
        [part.strip() for part in _THINK_TAG.split(text) if part.strip()]
        for text in (content_text(message.get("content")), *reasoning_texts(message))
    ]
    for call in message.get("tool_calls") or ():
        groups.append([text.strip() for text in tool_call_texts(call) if text.strip()])
    return [group for group in groups if group]


def first_missing(rendered: str, message: Message) -> str | None:
    """The first text of the message that `rendered` does not hold, or None if it holds all."""
    for group in required_texts(message):
        position = 0
        for text in group:
            found = _find(rendered, text, position)
            if (
                found < 0 and (found := _find(rendered, text, 0)) < 0
            ):  # templates may sort arguments, put reasoning first
                return text
            position = found + len(text)
    return None


def _find(rendered: str, text: str, position: int) -> int:
    found = rendered.find(text, position)
    if found >= 0:
        return found
    for ascii_only in (False, True):  # arguments rendered as JSON
        found = rendered.find(json.dumps(text, ensure_ascii=ascii_only)[1:-1], position)
        if found >= 0:
            return found
    return -1


def batch_is_clean(arrays: Sequence[tuple[np.ndarray, np.ndarray]], rules: RowRules) -> bool:
    """Whether `find_violation` is None for every row, `(input_ids, labels)`, at the price of one pass over them all.

    False may also mean that it takes a look at each row to tell (empty rows).
    """
    lengths = np.array([len(ids) for ids, _ in arrays])
    if not len(lengths) or not lengths.all() or any(len(ids) != len(labels) for ids, labels in arrays):
        return not len(lengths)
    ids = np.concatenate([ids for ids, _ in arrays])
    labels = np.concatenate([labels for _, labels in arrays])
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    supervised = labels != IGNORE_INDEX
    if (
        ids.min() < 0
        or ids.max() >= rules.vocabulary_size
        or (supervised & (labels != ids)).any()
        or not np.logical_or.reduceat(supervised, starts).all()
        or supervised[starts].any()
    ):
        return False
    if rules.bos_token_id is not None:
        second = np.minimum(starts + 1, len(ids) - 1)
        if ((lengths > 1) & (ids[starts] == rules.bos_token_id) & (ids[second] == rules.bos_token_id)).any():
            return False
    # No run goes on into the next row, since no first label is supervised.
    return rules.stop_token_ids is None or not len(missing_stop_runs(ids, labels, rules.stop_token_ids))


def check_batch(arrays: Sequence[tuple[np.ndarray, np.ndarray]], rules: RowRules) -> None:
    """Raises:
    MaskingError: for the first bad row, with its position in the batch as `row`.
    """
    if batch_is_clean(arrays, rules):
        return
    for row, (ids, labels) in enumerate(arrays):
        violation = find_violation(ids, labels, rules)
        if violation is not None:
            raise violation.at_row(row)
