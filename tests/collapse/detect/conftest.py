"""A world of answers, its baseline, and one of answers made of words."""

import numpy as np
import pytest

from sft_plugins.collapse.detect.verdict import Probe
from sft_plugins.collapse.metrics.per_prompt import Measures
from testkit.answer_worlds import World, make_world
from testkit.probes import PROMPTS, K, answers, probe, varied_answers, varied_vectors


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(PROMPTS, np.random.default_rng(0))


@pytest.fixture(scope="module")
def base(world: World) -> Measures:
    return world.measured(16, np.random.default_rng(1), equal_k=K)


@pytest.fixture(scope="module")
def real_base(world: World) -> Probe:
    rng = np.random.default_rng(2)
    return probe(0, answers(varied_answers(rng, 16), varied_vectors(world, rng, 16)))
