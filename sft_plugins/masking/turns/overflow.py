"""Rows longer than `max_length`: refused, dropped, or cut, and always counted."""

from __future__ import annotations

from dataclasses import replace

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import MaskingError
from sft_plugins.masking.options import MaskingOptions
from sft_plugins.masking.turns.labels import MaskedExample


def fit(example: MaskedExample, options: MaskingOptions, errors: list[MaskingError]) -> MaskedExample | None:
    """`example` no longer than `options.max_length`, or None with the reason appended to `errors`.

    A cut through a turn leaves that turn without a stop token: the model is not taught to stop there. A cut that leaves
    nothing to train on is no row at all (`no_supervised_tokens`).
    """
    length, limit = len(example.input_ids), options.max_length
    if limit is None or length <= limit:
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
        # A supervised run that goes on across the limit is a turn that does not fit.
        ends = [i for i in range(limit, 0, -1) if example.labels[i - 1] != IGNORE_INDEX]
        if ends and ends[0] == limit and example.labels[limit] != IGNORE_INDEX:
            start = next(i for i in range(limit, -1, -1) if example.labels[i - 1] == IGNORE_INDEX)
            ends = [i for i in ends if i <= start]
        cut = ends[0] if ends else 0
    kept = sum(label != IGNORE_INDEX for label in example.labels[:cut])
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
    supervised = sum(label != IGNORE_INDEX for label in example.labels)
    return replace(
        example,
        input_ids=example.input_ids[:cut],
        labels=example.labels[:cut],
        role_tokens={"trained": kept, "untrained": cut - kept},
        lost_tokens=length - cut,
        lost_supervised=supervised - kept,
    )
