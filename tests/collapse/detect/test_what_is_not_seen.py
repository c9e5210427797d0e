"""What the detector cannot see it says; what it saw it says the same of again."""

import dataclasses
import json

import numpy as np
import pytest

from sft_plugins.collapse.detect.comparison import estimate, unusable
from sft_plugins.collapse.detect.detector import detect
from sft_plugins.collapse.detect.verdict import DetectorConfig, Probe
from sft_plugins.collapse.metrics.per_prompt import Measures
from sft_plugins.errors import CollapseError
from testkit.answer_worlds import World, make_world
from testkit.collapse_runs import simulated_run
from testkit.probes import PROMPTS, K, changed, finding, probe, scaled

# --- what cannot be seen is said --------------------------------------------------------------------------------------


def without_embeddings(measures: Measures) -> Measures:
    return dataclasses.replace(changed(measures, semantic_distance=np.nan), cross_similarity=None)


def test_no_embedder_no_semantic_alarm_however_far_wording_falls(real_base: Probe) -> None:
    """C8: lexical figures never stand in for meaning."""
    assert real_base.measures is not None
    blind = without_embeddings(real_base.measures)
    now = probe(10, changed(blind, unique=1 / K, self_bleu=100.0, distinct_1=0.01, distinct_2=0.01), forks=0.1)
    verdict = detect(probe(0, blind), [now, dataclasses.replace(now, step=20)])
    assert verdict.level == "none"
    assert verdict.codes == {"no_embedder"}
    for seen in ((real_base, now), (probe(0, blind), dataclasses.replace(real_base, step=10))):  # on one side only
        assert detect(seen[0], [seen[1]]).codes == {"no_embedder"}
    assert "sft-plugins[semantic]" in finding(verdict, "no_embedder").suggestion
    assert "diversity_retained" not in verdict.estimates


@pytest.mark.parametrize(
    ("figure", "value", "words"),
    [
        ("repetition", 0.5, "50% of the 4-grams in an answer are repeats"),
        ("truncated", 1.0, "100% of the answers ran into the length limit"),
        ("empty", 0.75, "75% of the answers are empty"),
    ],
)
def test_an_unusable_baseline_gives_no_verdict_and_says_why(
    base: Measures, figure: str, value: float, words: str
) -> None:
    low = scaled(base, 0.1)
    broken = changed(base, **{figure: value})
    assert unusable(base, config=DetectorConfig()) is None
    verdict = detect(probe(0, broken), [probe(1, low), probe(2, low)])
    assert verdict.codes == {"baseline_unusable"}
    assert verdict.level == "none"
    assert words in verdict.findings[0].evidence


def test_no_baseline_and_no_probe_are_statements_not_silence(base: Measures) -> None:
    low = scaled(base, 0.1)
    assert detect(None, [probe(1, low), probe(2, low)]).codes == {"no_baseline"}
    assert detect(probe(0, None), [probe(1, low)]).codes == {"no_baseline"}
    verdict = detect(probe(0, base), [])
    assert (verdict.codes, verdict.step, verdict.level) == ({"no_probe"}, None, "none")


def test_one_sample_per_prompt_is_said_to_have_no_diversity(world: World, base: Measures) -> None:
    single = world.measured(1, np.random.default_rng(0))
    verdict = detect(probe(0, base), [probe(1, single), probe(2, single)])
    assert verdict.codes == {"one_sample"}
    assert "samples_per_prompt" in verdict.findings[0].suggestion


@pytest.mark.parametrize("prompts", [1, 3])
def test_one_prompt_or_three_are_too_few(prompts: int) -> None:
    rng = np.random.default_rng(0)
    world = make_world(prompts, rng)
    now = world.narrowed(0.1).measured(K, rng)
    verdict = detect(probe(0, world.measured(16, rng)), [probe(1, now), probe(2, now)])
    assert "too_few_prompts" in verdict.codes
    assert "narrowing" not in verdict.codes
    assert f"{prompts} open prompts can be compared, 4 are needed" in finding(verdict, "too_few_prompts").evidence


def test_prompts_with_nan_embeddings_are_left_out_and_too_many_are_said(base: Measures) -> None:
    low = scaled(base, 0.3)
    some, most = (low.per_prompt["semantic_distance"].copy() for _ in range(2))
    some[:4], most[3:] = np.nan, np.nan
    heard = [
        detect(probe(0, base), [probe(i, changed(low, semantic_distance=d)) for i in (1, 2)]) for d in (some, most)
    ]
    assert finding(heard[0], "narrowing").level == "warn"
    assert heard[0].estimates["diversity_retained"].clusters == 12
    assert heard[1].codes == {"too_few_prompts"}


def test_a_baseline_without_any_diversity_of_its_own_divides_nothing(base: Measures) -> None:
    verdict = detect(probe(0, scaled(base, 0.0)), [probe(1, base), probe(2, base)])
    assert "diversity_retained" not in verdict.estimates
    assert verdict.level == "ok"


def test_nan_logits_are_said(base: Measures) -> None:
    verdict = detect(probe(0, base), [dataclasses.replace(probe(1, base), nonfinite=12)])
    assert verdict.codes == {"nonfinite_logits"}
    assert "12 supervised positions" in verdict.findings[0].evidence


def test_a_model_that_degenerates_is_named_as_such(base: Measures) -> None:
    loops = changed(base, repetition=0.9)
    verdict = detect(probe(0, base), [probe(1, loops), probe(2, loops)])
    assert verdict.codes == {"degeneration"}
    assert verdict.level == "info"


def test_a_baseline_of_other_prompts_is_refused(base: Measures) -> None:
    other = dataclasses.replace(base, tags=("closed",) * PROMPTS)
    with pytest.raises(CollapseError, match="their tags differ") as error:
        detect(probe(0, base), [probe(1, other)])
    assert error.value.code == "prompts_changed"


# --- purity -----------------------------------------------------------------------------------------------------------


def test_a_run_resumed_from_its_history_file_decides_the_same() -> None:
    def through_json(item: Probe) -> Probe:
        assert item.measures is not None
        text = json.dumps(item.measures.to_json(), allow_nan=False)
        return dataclasses.replace(item, measures=Measures.from_json(json.loads(text)))

    baseline, probes = simulated_run([0.8, 0.5, 0.3, 0.3], seed=0)
    resumed = detect(through_json(baseline), [through_json(item) for item in probes])
    assert resumed == detect(baseline, probes)
    assert resumed.findings


def test_a_verdict_is_plain_json() -> None:
    baseline, probes = simulated_run([0.3, 0.3], seed=0)
    data = json.loads(json.dumps(detect(baseline, probes).to_json(), allow_nan=False))
    assert data["level"] == "warn"
    assert data["findings"][0]["code"] == "narrowing"
    assert data["estimates"]["diversity_retained"]["hi"] < 0.62


def test_estimates_hold_what_was_measured_and_nothing_else(base: Measures) -> None:
    everything = set(estimate(probe(0, base), probe(1, base), config=DetectorConfig()))
    assert everything == {
        "diversity_retained",
        "fork_retention",
        "opening_rise",
        "information_change",
        "similarity_rise",
        "specificity_change",
    }
    assert set(estimate(probe(0, None), probe(1, None), config=DetectorConfig())) == {"fork_retention"}
