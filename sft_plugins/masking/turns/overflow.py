"""Rows longer than `max_length`: refused, dropped, or cut, and always counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import MaskingError
from sft_plugins.masking.checks import supervised_runs
from sft_plugins.masking.options import MaskingOptions
from sft_plugins.masking.turns.masked import MaskedExample


def fit(example: MaskedExample, options: MaskingOptions, errors: list[MaskingError]) -> MaskedExample | None:
    """`example` no longer than `options.max_length`, or None with the reason appended to `errors`.

    A cut through a turn leaves that turn without a stop token: the model is not taught to stop there. A cut that leaves
    nothing to train on is no row at all (`no_supervised_tokens`).
    """
    limit = options.max_length
    if limit is None:
        return example
    ids, labels = example.arrays
    length = len(ids)
    if length <= limit:
        return example
    if options.overflow in ("raise", "drop"):
        errors.append(
            MaskingError(
                f"the row has {length} tokens, max_length is {limit}.",
                code="overflow",
                remedy='Raise {max_length}, or choose {overflow:overflow="drop", "truncate" or "keep_turns"}.',
            )
        )
        return None
    cut = limit
    if options.overflow == "keep_turns":
        cut = max((end for end in _turn_ends(example) if end <= limit), default=0)
    trained = labels != IGNORE_INDEX
    kept = int(trained[:cut].sum())
    if not kept:
        errors.append(
            MaskingError(
                f"the row has {length} tokens and its first {limit} hold no "
                f"{'whole answer' if options.overflow == 'keep_turns' else 'token that carries loss'}.",
                code="no_supervised_tokens",
                remedy='Raise {max_length}, or drop such rows with {errors:errors="drop"} (they are counted).',
            )
        )
        return None
    ends = [end for end in example.turn_ends if end <= cut]
    # The turn that the cut goes through counts, if a token of it is left.
    begun = len(ends) + bool(trained[max(ends, default=0) : cut].any())
    return replace(
        example,
        input_ids=ids[:cut],
        labels=labels[:cut],
        role_tokens={"trained": kept, "untrained": cut - kept},
        turn_ends=ends,
        modes=example.modes[:begun],
        changes=example.changes[:begun],
        lost_tokens=length - cut,
        lost_supervised=int(trained.sum()) - kept,
    )


def _turn_ends(example: MaskedExample) -> Sequence[int]:
    """Where supervised turns end. Of rows tokenised elsewhere only runs of labels are known, which may hold several turns."""
    return example.turn_ends or supervised_runs(example.arrays[1])[:, 1].tolist()
