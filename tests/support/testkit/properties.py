"""`quiet`: the settings of property tests. The same examples on every machine, so that there is no luck in a gate."""

from __future__ import annotations

import functools

from hypothesis import HealthCheck, Phase, settings

# `explain` is left out: it re-runs a failing example hundreds of times.
quiet = functools.partial(
    settings,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
