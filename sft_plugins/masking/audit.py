"""`check_masks`: an audit of rows that somebody else tokenised and labelled.

It finds what can be seen in ids and labels: structure, stop tokens, assistant turns left out, headers of the template inside
supervised runs. It cannot see text that was lost before tokenisation; for that, mask the raw rows.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import MaskingError
from sft_plugins.masking.checks import RowRules, find_violation, supervised_runs
from sft_plugins.masking.examples.tokenized import documents_of
from sft_plugins.masking.headers.assistant import assistant_header, turn_starts, unsupervised_turns
from sft_plugins.masking.headers.own import OwnHeaders, find_own_headers
from sft_plugins.masking.rendering.template import ChatRenderer
from sft_plugins.masking.report import PREFIX_ROWS, PREFIX_TOKENS, MaskReport, repeated_prefixes
from sft_plugins.masking.turns.stop_tokens import find_stop_tokens
from sft_plugins.masking.turns.tokenizer import TextTokenizer


def check_masks(dataset: Dataset | Iterable[Mapping[str, Any]], tokenizer: Any) -> MaskReport:
    """Audit rows with `input_ids` and `labels`, `completion_mask` or `assistant_masks`. Nothing is raised for a bad row.

    Packed rows (with `seq_lengths`) are taken apart: `rows_out`, failures and what is counted by length are their documents,
    and `first_documents` says which. Of trees a document is its path: tokens are counted in every row that shares them,
    labels once.

    Returns:
        A `MaskReport` whose `failures` count, by code, the rows that break an invariant of strict masking:
        `length_mismatch`, `id_out_of_range`, `label_mismatch`, `no_supervised_tokens`, `first_label`, `double_bos`,
        `missing_stop` (a supervised run ends elsewhere than on a stop token), `prompt_supervised` (another turn's header
        carries loss), `unsupervised_turn` (an answer of a row whose other answers are trained carries none; of rows that train
        one answer, only if no other row trains the answer to that very prompt, as those of a split history do), `bad_schema`.

    Raises:
        MaskingError: `empty_dataset`, or `bad_schema` where the tokenizer is none.
    """
    text = TextTokenizer(tokenizer)
    renderer = ChatRenderer(tokenizer)
    stops = find_stop_tokens(text, renderer, None).ids
    header = assistant_header(text, renderer)
    own_headers = _OwnHeaders(tokenizer, header, text)
    rules = RowRules(vocabulary_size=text.size, bos_token_id=tokenizer.bos_token_id)
    names = {i: text.decode([i]) for i in stops}
    report, packed, stored = MaskReport(), False, 0
    prompts: list[np.ndarray] = []
    # Documents by what stands before their supervised runs; and those with answers left out: row, document, message, what
    # stands before their one run, and before each answer that carries no loss.
    trained: dict[bytes, set[int]] = defaultdict(set)
    untrained: list[tuple[int, int, str, bytes, list[bytes]]] = []
    for row, example in enumerate(dataset):
        report.rows_in += 1
        try:
            documents = documents_of(example) if "input_ids" in example else _refuse(example)
        except MaskingError as error:
            report.add_failure(error.code, row, error.message, document=0)
            continue
        packed |= len(documents) > 1
        stored += len(example["input_ids"])
        in_trees = sum(len(ids) for ids, *_ in documents) > len(example["input_ids"])
        for document, (ids, labels, trained_elsewhere) in enumerate(documents):
            violation = find_violation(ids, labels, rules)
            if violation is not None and not (trained_elsewhere and violation.code == "no_supervised_tokens"):
                report.add_failure(violation.code, row, violation.message, document=document)
                if violation.code in ("length_mismatch", "id_out_of_range") or not len(ids):
                    continue
            runs = supervised_runs(labels)
            begun = turn_starts(ids, header)
            for start, _ in runs:
                # As the row has it, and up to the header: the prompt may go on behind it with what later rows leave out.
                for at in {int(start), *begun[begun <= start][-1:].tolist()}:
                    trained[_digest(ids[:at])].add(report.rows_out)
            for code, message in _turn_faults(ids, labels, stops, text, own_headers):
                report.add_failure(code, row, message, document=document)
            missed = unsupervised_turns(ids, labels, header) if len(runs) else np.empty(0, np.int64)
            if missed.size:
                message = f"{missed.size} answers carry no loss, the first at token {int(missed[0])}."
                # Of a tree a row may train what earlier rows of its conversation train too, where both end alike.
                before = [_digest(ids[:at]) for at in missed] if len(runs) == 1 or in_trees else []
                untrained.append((row, document, message, _digest(ids[: runs[0, 0]]), before))
            report.add_rows(np.array([row]), ids, labels, np.array([0, len(ids)]), names)
            if len(prompts) < PREFIX_ROWS:
                supervised = labels != IGNORE_INDEX
                width = int(np.argmax(supervised)) if supervised.any() else len(ids)
                prompts.append(ids[: min(width, PREFIX_TOKENS)].copy())  # a view would keep all of `ids` in memory
    elsewhere = 0
    for row, document, message, own, before in untrained:
        # A document that trains both shows that the answers could share one: then this row has forgotten some.
        if before and all(trained.get(one) and not trained[one] & trained[own] for one in before):
            elsewhere += 1
        else:
            report.add_failure("unsupervised_turn", row, message, document=document)
    if not report.rows_in:
        raise MaskingError("the dataset has no rows.", code="empty_dataset", remedy="Check the file and the split.")
    report.role_tokens = {
        "trained": report.supervised_tokens,
        "untrained": report.tokens - report.supervised_tokens,
    }
    report.repeated_prefixes = repeated_prefixes(prompts)
    if elsewhere:
        report.notes.append(
            f"{elsewhere:,} rows train their last answer alone; other rows train the ones before (a split history)"
        )
    if packed:
        report.notes.append("rows are packed: each of their documents was checked by itself")
        if report.tokens > stored:
            report.notes.append(
                f"documents that begin alike share tokens (trees): {stored:,} tokens hold rows of {report.tokens:,}"
            )
    else:
        report.failures = {code: replace(found, first_documents=[]) for code, found in report.failures.items()}
    if not header:
        report.notes.append("the tokenizer has no chat template that marks assistant turns: turns were not checked")
    return report


class _OwnHeaders:
    """Finds `OwnHeaders` when first asked: most rows put no loss on a header."""

    def __init__(self, tokenizer: Any, header: list[int], text: TextTokenizer) -> None:
        self._tokenizer, self._special = tokenizer, text.special_ids
        self.opening = next((token for token in header if token in text.special_ids), None)

    @cached_property
    def found(self) -> OwnHeaders:
        assert self.opening is not None
        return find_own_headers(self._tokenizer, self.opening, frozenset(self._special))


def _turn_faults(
    ids: np.ndarray,
    labels: np.ndarray,
    stops: frozenset[int],
    text: TextTokenizer,
    own_headers: _OwnHeaders,
) -> list[tuple[str, str]]:
    """`(code, message)` of each fault of the supervised runs; empty for rows without a supervised token."""
    faults = []
    runs = supervised_runs(labels)
    if not len(runs):
        return []
    if stops:
        for start, end in runs[~np.isin(ids[runs[:, 1] - 1], list(stops))][:1]:
            tail = text.decode(ids[max(start, end - 4) : end].tolist())
            faults.append(("missing_stop", f"the supervised tokens [{start}, {end}) end with {tail!r}, no stop token."))
    opening = own_headers.opening
    if opening is not None and opening not in stops:
        inside = np.flatnonzero(labels == opening).tolist()
        wrong = next((at for at in inside if not own_headers.found.has(ids, labels, at)), None)
        if wrong is not None:
            faults.append(
                ("prompt_supervised", f"the header token {text.decode([opening])!r} at {wrong} carries loss.")
            )
    return faults


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=8).digest()


def _refuse(example: Mapping[str, Any]) -> Any:
    raise MaskingError(
        f"no `input_ids`; found columns {', '.join(map(repr, example)) or 'none'}.",
        code="bad_schema",
        remedy="check_masks audits rows already tokenised; mask raw rows with mask_dataset.",
    )
