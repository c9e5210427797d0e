"""Whole training runs as the detector sees them, made from `answer_worlds`: a baseline and probes of known truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sft_plugins.collapse.detect.detector import Detector
from sft_plugins.collapse.detect.verdict import DetectorConfig, Probe, Verdict
from testkit.answer_worlds import fork_entropy, make_world

PAIRS = 24


def simulated_run(
    retained: Sequence[float],
    *,
    seed: int,
    prompts: int = 16,
    k: int = 8,
    k_base: int = 16,
    scatter: float = 0.2,
    fork_retained: Sequence[float] | None = None,
    heldout: Sequence[float] | None = None,
) -> tuple[Probe, list[Probe]]:
    """A baseline and one probe per entry of `retained`, the true share of diversity kept at that probe.

    `retained` is true of all the prompts that could have been asked; those that are asked change each by a factor of its
    own around it (uniform, ± `scatter`). Fork entropy follows diversity and held-out loss falls, unless given.
    """
    rng = np.random.default_rng(seed)
    base = make_world(prompts, rng)
    drift = rng.uniform(1 - scatter, 1 + scatter, size=prompts)
    forks = rng.uniform(5, 15, size=PAIRS)
    baseline = Probe(step=0, measures=base.measured(k_base, rng, equal_k=k), fork_entropy=forks, heldout_loss=3.0)
    models = {share: base.narrowed(share).spread(drift) for share in set(retained)}
    probes = []
    for i, share in enumerate(retained):
        probes.append(
            Probe(
                step=10 * (i + 1),
                measures=models[share].measured(k, rng),
                fork_entropy=fork_entropy(PAIRS, share if fork_retained is None else fork_retained[i], forks, rng),
                heldout_loss=2.9 - 0.1 * i if heldout is None else heldout[i],
            )
        )
    return baseline, probes


def detect_each(
    baseline: Probe | None, probes: Sequence[Probe], *, config: DetectorConfig | None = None
) -> list[Verdict]:
    """The verdict after each of `probes` that has tier 2, as `detect` would have given it then."""
    detector = Detector(baseline, config=config)
    return [detector.add(probe) for probe in probes if probe.measures is not None]
