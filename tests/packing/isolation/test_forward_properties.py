"""Whatever a forward is given, nothing is silent: drawn by hypothesis, set against the documents alone."""

from __future__ import annotations

import copy
from collections import Counter

from hypothesis import given

from sft_plugins.packing import isolate
from testkit.forward_inputs import Case, cases, fault, outcome
from testkit.properties import quiet
from testkit.tiny_models import build

PLAIN = build("llama", num_hidden_layers=1).model
ISOLATED = copy.deepcopy(PLAIN)
SEEN: Counter[str] = Counter()


@quiet(max_examples=300)
@given(cases())
def each_forward_is_exact_for_all_that_it_is_told_or_refused(case: Case) -> None:
    what, difference = outcome(ISOLATED, PLAIN, case)
    SEEN[("spoiled " if case.spoiled else "") + what] += 1
    assert fault(case, what, difference) is None


def test_p17_nothing_that_a_forward_is_given_is_silent() -> None:
    """P16, P17: `tests/benchmarks/bench_forward_inputs.py` draws ten thousand and more."""
    isolate(ISOLATED)
    each_forward_is_exact_for_all_that_it_is_told_or_refused()
    assert SEEN["ran"] > 50
    assert sum(SEEN[kind] for kind in SEEN if kind.startswith("spoiled ") and kind != "spoiled ran") > 30
