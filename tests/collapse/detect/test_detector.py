"""The detector against models whose truth is known: it says what is so, in time, and nothing else."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import pytest

from sft_plugins.collapse.detect.bootstrap import Estimate
from sft_plugins.collapse.detect.comparison import estimate, unusable
from sft_plugins.collapse.detect.detector import detect
from sft_plugins.collapse.detect.verdict import LEVELS, DetectorConfig, Finding, Probe, Verdict
from sft_plugins.collapse.metrics.per_prompt import Measures, measure
from sft_plugins.errors import CollapseError
from testkit.answer_worlds import World, make_world
from testkit.collapse_runs import detect_each, simulated_run

PROMPTS, K = 16, 8
FORKS = np.random.default_rng(7).uniform(5, 15, 24)


def probe(step: int, measures: Measures | None, *, forks: float | None = 1.0, loss: float | None = None) -> Probe:
    return Probe(step=step, measures=measures, fork_entropy=None if forks is None else FORKS * forks, heldout_loss=loss)


def changed(measures: Measures, **per_prompt: np.ndarray | float) -> Measures:
    """`measures` with whole figures replaced."""
    figures = {name: np.broadcast_to(value, len(measures.tags)).astype(float) for name, value in per_prompt.items()}
    return dataclasses.replace(measures, per_prompt={**measures.per_prompt, **figures})


def scaled(measures: Measures, share: float) -> Measures:
    """`measures` with `share` of its diversity."""
    return changed(measures, semantic_distance=measures.per_prompt["semantic_distance"] * share)


def finding(verdict: Verdict, code: str) -> Finding:
    (found,) = [item for item in verdict.findings if item.code == code]
    return found


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(PROMPTS, np.random.default_rng(0))


@pytest.fixture(scope="module")
def base(world: World) -> Measures:
    return world.measured(16, np.random.default_rng(1), equal_k=K)


# --- synthetic truth, from answers on ---------------------------------------------------------------------------------

SAFE = "I am here to help with anything you need ."
WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heron",
    "islet",
    "jetty",
    "knoll",
    "larch",
    "maple",
    "north",
    "ocean",
    "plume",
]


def answers(
    texts: Sequence[Sequence[str]], vectors: Sequence[np.ndarray], tags: Sequence[str] = ("open",) * PROMPTS
) -> Measures:
    tokens = [[text.split() for text in group] for group in texts]
    return measure(texts, tokens, tags=tags, embeddings=vectors, equal_k=K, information_length=1, rarefy_to=20)


def varied_answers(rng: np.random.Generator, k: int) -> list[list[str]]:
    """Every prompt begins with a word of its own most of the time, then goes on at random."""
    return [
        [" ".join([WORDS[p] if rng.random() < 0.7 else "well", *rng.choice(WORDS, size=7)]) for _ in range(k)]
        for p in range(PROMPTS)
    ]


def varied_vectors(world: World, rng: np.random.Generator, k: int) -> list[np.ndarray]:
    return [rows[rng.integers(0, len(rows), size=k)] for rows in world.vectors]


@pytest.fixture(scope="module")
def real_base(world: World) -> Probe:
    rng = np.random.default_rng(2)
    return probe(0, answers(varied_answers(rng, 16), varied_vectors(world, rng, 16)))


@pytest.mark.parametrize("forks", [0.05, None])
def test_one_sentence_to_everything_is_critical_and_homogeneous(
    world: World, real_base: Probe, forks: float | None
) -> None:
    """Also without held-out pairs: similarity across prompts is the second axis."""
    rng = np.random.default_rng(3)
    one = world.vectors[0, 0] + rng.normal(0, 0.005, size=(PROMPTS, K, world.vectors.shape[2]))
    now = answers([[SAFE] * K] * PROMPTS, list(one))
    heard = detect_each(real_base, [probe(10, now, forks=forks), probe(20, now, forks=forks)])
    assert [verdict.level for verdict in heard] == ["ok", "critical"]
    assert heard[1].codes == {"narrowing", "homogeneity"}
    assert "different prompts are closer" in finding(heard[1], "narrowing").evidence
    assert "nats less about their prompt" in finding(heard[1], "homogeneity").evidence
    assert "WiSE-FT" in finding(heard[1], "narrowing").suggestion


def test_one_sentence_is_homogeneous_also_where_the_baselines_openings_told_nothing(
    world: World, real_base: Probe
) -> None:
    """Every opening of the baseline was new: information about the prompt cannot fall, so meaning is asked."""
    assert real_base.measures is not None
    silent = changed(real_base.measures, opening_information=0.0)
    rng = np.random.default_rng(3)
    one = world.vectors[0, 0] + rng.normal(0, 0.005, size=(PROMPTS, K, world.vectors.shape[2]))
    now = probe(10, answers([[SAFE] * K] * PROMPTS, list(one)))
    verdict = detect(probe(0, silent), [now, dataclasses.replace(now, step=20)])
    assert "less specific to their prompt" in finding(verdict, "homogeneity").evidence


def test_confident_but_prompt_specific_is_narrow_not_homogeneous(world: World, real_base: Probe) -> None:
    rng = np.random.default_rng(3)
    own = [np.repeat(rows[:1], K, axis=0) + rng.normal(0, 0.005, size=(K, rows.shape[1])) for rows in world.vectors]
    texts = [[f"{WORDS[p]} it is and nothing else"] * K for p in range(PROMPTS)]
    now = answers(texts, own)
    verdict = detect(real_base, [probe(10, now, forks=0.1), probe(20, now, forks=0.1)])
    assert verdict.codes == {"narrowing"}
    assert verdict.level == "critical"
    assert "fork entropy" in finding(verdict, "narrowing").evidence


def test_a_common_style_that_keeps_to_its_prompt_is_not_homogeneity(base: Measures) -> None:
    """All answers move closer to one another, as a house style does, yet tell as much about their prompt as before."""
    assert base.cross_similarity is not None
    styled = dataclasses.replace(base, cross_similarity=base.cross_similarity + 0.2)
    loud = dataclasses.replace(
        changed(base, opening_information=base.per_prompt["opening_information"] - 0.5),
        cross_similarity=base.cross_similarity + 0.2,
    )
    heard = [detect(probe(0, base), [probe(1, now), probe(2, now)]) for now in (styled, loud)]
    assert [verdict.codes for verdict in heard] == [set(), {"homogeneity"}]


def test_the_history_of_verdicts_is_what_was_heard_at_each_probe() -> None:
    baseline, probes = simulated_run([1.0, 0.7, 0.4, 0.3], seed=0)
    probes.insert(1, probe(15, None))
    every = detect_each(baseline, probes)
    assert every == [detect(baseline, probes[:n]) for n in (1, 3, 4, 5)]
    assert [verdict.step for verdict in every] == [10, 20, 30, 40]
    assert detect_each(None, probes)[0].codes == {"no_baseline"}
    assert detect_each(baseline, []) == []


def test_without_a_second_axis_the_same_fall_is_a_warning_that_says_so(world: World, base: Measures) -> None:
    now = world.narrowed(0.02).measured(K, np.random.default_rng(3))
    for forks, level in ((1.0, "warn"), (None, "warn"), (0.2, "critical")):
        verdict = detect(probe(0, base), [probe(10, now, forks=forks), probe(20, now, forks=forks)])
        assert verdict.level == level
        assert ("no second axis" in finding(verdict, "narrowing").evidence) == (level == "warn")


def test_narrowing_of_closed_prompts_alone_is_silent() -> None:
    """There, one answer is right; the control is still shown."""
    rng = np.random.default_rng(0)
    tags = ("open", "closed") * 8
    world = make_world(16, rng, tags=tags)
    is_closed = np.array([tag == "closed" for tag in tags])
    now = world.narrowed(np.where(is_closed, 0.02, 1.0))
    baseline = probe(0, world.measured(16, rng, equal_k=K))
    verdict = detect(baseline, [probe(10 * i, now.measured(K, rng)) for i in (1, 2, 3)])
    assert verdict.level == "ok"
    assert verdict.findings == verdict.pending == ()
    assert verdict.estimates["closed_diversity_retained"].hi < 0.38
    assert verdict.estimates["diversity_retained"].lo < 1 < verdict.estimates["diversity_retained"].hi

    # and the same fall on the open half is heard
    other = world.narrowed(np.where(is_closed, 1.0, 0.02))
    loud = detect(baseline, [probe(10 * i, other.measured(K, rng)) for i in (1, 2)])
    assert finding(loud, "narrowing").level == "warn"


def test_closed_prompts_that_answer_alike_are_not_homogeneity() -> None:
    """ "Yes." to every closed question is no safe answer to everything."""
    rng = np.random.default_rng(0)
    tags = ("open",) * 8 + ("closed",) * 8
    world = make_world(16, rng, tags=tags)
    vectors = varied_vectors(world, rng, K)
    texts = varied_answers(rng, K)
    baseline = probe(0, answers(texts, vectors, tags))
    alike = [*vectors[:8], *[np.repeat(world.vectors[8, :1], K, axis=0)] * 8]
    now = answers([*texts[:8], *[["Yes ."] * K] * 8], alike, tags)
    verdict = detect(baseline, [probe(10, now), probe(20, now)])
    assert verdict.level == "ok"
    assert verdict.estimates["opening_rise"].value == verdict.estimates["similarity_rise"].value == 0


def test_paraphrases_of_one_answer_are_caught_by_meaning_though_wording_varies_more(
    world: World, real_base: Probe
) -> None:
    """C8: lexical figures rise while meaning collapses."""
    rng = np.random.default_rng(3)
    assert real_base.measures is not None
    invented = iter(range(10_000))
    texts = [[" ".join(f"word{next(invented)}" for _ in range(8)) for _ in range(K)] for _ in range(PROMPTS)]
    meaning = [np.repeat(rows[:1], K, axis=0) + rng.normal(0, 0.01, size=(K, rows.shape[1])) for rows in world.vectors]
    now = answers(texts, meaning)
    for lexical in ("distinct_1", "distinct_2", "unique"):
        assert now.mean(lexical) >= real_base.measures.mean(lexical)  # type: ignore[operator]
    assert now.mean("self_bleu") < real_base.measures.mean("self_bleu")  # type: ignore[operator]
    verdict = detect(real_base, [probe(10, now, forks=0.3), probe(20, now, forks=0.3)])
    assert finding(verdict, "narrowing").level == "critical"


def test_a_healthy_run_is_at_most_info() -> None:
    """Ordinary fine-tuning costs some variety while held-out loss falls."""
    for seed in range(4):
        baseline, probes = simulated_run(np.linspace(1, 0.75, 6).tolist(), seed=seed)
        heard = detect_each(baseline, probes)
        assert {verdict.level for verdict in heard} <= {"ok", "info"}
        assert heard[-1].codes <= {"narrowing"}
        assert heard[-1].healthy_step == probes[-1].step


# --- persistence ------------------------------------------------------------------------------------------------------


def test_nothing_is_found_by_a_single_probe(base: Measures) -> None:
    low, well = scaled(base, 0.3), scaled(base, 1.0)
    heard = detect_each(probe(0, base), [probe(i, m) for i, m in enumerate((low, well, low, low, well), start=1)])
    assert [verdict.level for verdict in heard] == ["ok", "ok", "ok", "warn", "ok"]
    assert [[found.level for found in verdict.pending] for verdict in heard] == [["warn"], [], ["warn"], [], []]
    assert [verdict.healthy_step for verdict in heard] == [None, 2, 2, 2, 5]
    assert "step 2" in finding(heard[3], "narrowing").suggestion


def test_a_finding_is_confirmed_at_the_lower_of_two_levels(base: Measures) -> None:
    heard = detect_each(
        probe(0, base), [probe(i, scaled(base, share)) for i, share in enumerate((0.8, 0.5, 0.5), start=1)]
    )
    assert [verdict.level for verdict in heard] == ["ok", "info", "warn"]
    assert [found.level for found in heard[1].pending] == ["warn"]


def test_persistence_is_a_parameter_and_skips_probes_that_sampled_nothing(base: Measures) -> None:
    low = scaled(base, 0.5)
    assert detect(probe(0, base), [probe(1, low)], config=DetectorConfig(persistence=1)).level == "warn"
    assert detect(probe(0, base), [probe(1, low), probe(2, None), probe(3, low)]).level == "warn"
    assert detect(probe(0, base), [probe(1, low), probe(3, low)], config=DetectorConfig(persistence=3)).level == "ok"


# --- bands ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "level"), [(1.0, "ok"), (1.2, "ok"), (0.99, "info"), (0.63, "info"), (0.61, "warn"), (0.39, "warn")]
)
def test_bands_are_read_from_the_upper_bound(base: Measures, share: float, level: str) -> None:
    now = scaled(base, share)
    assert detect(probe(0, base), [probe(1, now), probe(2, now)]).level == level


def test_a_wide_interval_stays_below_the_level_of_its_value(base: Measures) -> None:
    """The value says 0.55, but a few prompts carry it: the upper bound decides."""
    share = np.where(np.arange(PROMPTS) % 3 == 0, 0.05, 0.85)
    now = changed(base, semantic_distance=base.per_prompt["semantic_distance"] * share)
    found = finding(detect(probe(0, base), [probe(1, now), probe(2, now)]), "narrowing")
    assert found.value is not None
    assert found.hi is not None
    assert found.value < 0.62 < found.hi
    assert found.level == "info"


def test_a_figure_must_stand_out_among_all_that_are_tested(base: Measures, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holm: p = .015 is a finding for one figure alone, and chance for the best of five."""
    fall, flat = Estimate(0.9, 0.8, 0.99, 0.015, 16), Estimate(0.0, -0.1, 0.1, 0.9, 16)
    others = dict.fromkeys(("fork_retention", "opening_rise", "similarity_rise", "information_change"), flat)
    heard = []
    for figures in ({"diversity_retained": fall}, {"diversity_retained": fall, **others}):
        monkeypatch.setattr("sft_plugins.collapse.detect.detector.estimate", lambda *_, figures=figures, **__: figures)
        heard.append(detect(probe(0, base), [probe(1, base), probe(2, base)]).level)
    assert heard == ["info", "ok"]


def test_bands_are_parameters(base: Measures) -> None:
    now = scaled(base, 0.8)
    strict = DetectorConfig(warn_below=0.9, critical_below=0.85)
    verdict = detect(probe(0, base, forks=1), [probe(1, now, forks=0.5), probe(2, now, forks=0.5)], config=strict)
    assert verdict.level == "critical"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warn_below": 0.3}, "critical_below < warn_below < info_below"),
        ({"critical_below": 0.0}, "critical_below < warn_below < info_below"),
        ({"confidence": 95}, r"confidence must be in \(0.5, 1\), got 95"),
        ({"persistence": 0}, "persistence must be at least 1, got 0"),
        ({"min_prompts": 1}, "min_prompts must be at least 2"),
        ({"resamples": 10}, "resamples must be at least 200"),
        ({"opening_rise": 1.5}, "opening_rise must be in"),
        ({"max_empty": 0.0}, "max_empty must be in"),
        ({"confidence": float("nan")}, "confidence must be in"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(CollapseError, match=message) as error:
        DetectorConfig(**options)  # type: ignore[arg-type]
    assert error.value.code == "bad_option"


# --- tax without benefit ----------------------------------------------------------------------------------------------


def losses(base: Measures, shares: Sequence[float], values: Sequence[float | None]) -> list[Verdict]:
    probes = [
        probe(10 * (i + 1), scaled(base, share), loss=loss)
        for i, (share, loss) in enumerate(zip(shares, values, strict=True))
    ]
    return detect_each(probe(0, base, loss=3.0), probes)


def test_narrowing_that_no_longer_buys_loss_is_said_with_the_checkpoint_to_take(base: Measures) -> None:
    heard = losses(base, [0.95, 0.9, 0.85, 0.8], [2.5, 2.0, 2.0, 2.001])
    assert ["tax_without_benefit" in verdict.codes for verdict in heard] == [False, False, False, True]
    found = finding(heard[3], "tax_without_benefit")
    assert found.level == "info"
    assert found.value == pytest.approx(0.8 / 0.85)  # since the latest of the best
    assert "step 30" in found.suggestion


def test_what_is_rounded_to_zero_has_no_sign(base: Measures) -> None:
    """Float32 makes a cosine of one answer with itself 1.0000001: a diversity a little below 0."""
    gone = scaled(base, -1e-7)
    verdict = detect(probe(0, base), [probe(step, gone, loss=1.0 + step) for step in (1, 2)])
    found = finding(verdict, "narrowing")
    assert found.value is not None
    assert found.value < 0
    assert "keep 0% of" in found.evidence
    assert "interval 0%–0%," in found.evidence
    heard = losses(base, [0.95, 0.9, -1e-7, -1e-7], [2.5, 2.0, 2.1, 2.2])
    assert "fell to 0% (interval 0%–0%)" in finding(heard[3], "tax_without_benefit").evidence


def test_narrowing_while_heldout_loss_rises_is_a_warning(base: Measures) -> None:
    heard = losses(base, [0.95, 0.9, 0.85, 0.8], [2.5, 2.0, 2.1, 2.2])
    found = finding(heard[3], "tax_without_benefit")
    assert (found.level, heard[3].level) == ("warn", "warn")
    assert "since step 20" in found.evidence
    assert "rose (2.0000 → 2.2000 nats)" in found.evidence


@pytest.mark.parametrize(
    ("shares", "values"),
    [
        ([0.95, 0.9, 0.85, 0.8], [2.5, 2.4, 2.3, 2.2]),  # it buys loss
        ([0.8, 0.8, 0.8, 0.8], [2.5, 2.5, 2.5, 2.6]),  # it no longer narrows
        ([0.95, 0.9, 0.85, 0.8], [None, None, None, None]),  # nothing held out
        ([0.95, 0.9, 0.85, 0.8], [2.0, None, None, 2.0]),  # not two probes in a row
        ([0.95, 0.9, 0.85, 0.8], [2.0, 1.9, float("nan"), float("nan")]),  # a loss that is no number
    ],
)
def test_there_is_no_tax_without_benefit_otherwise(
    base: Measures, shares: list[float], values: list[float | None]
) -> None:
    assert all("tax_without_benefit" not in verdict.codes for verdict in losses(base, shares, values))


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


# --- error rates (the full table: tests/benchmarks/bench_detector_power.py) -------------------------------------------


def heard_at_least(verdict: Verdict, level: str) -> bool:
    return LEVELS.index(verdict.level) >= LEVELS.index(level)


@pytest.mark.slow
def test_false_alarms_are_rare_on_runs_that_lose_nothing() -> None:
    """Any finding at any of six probes counts; the baseline's luck is in all of them."""
    config = DetectorConfig(resamples=600)
    runs = [detect_each(*simulated_run([1.0] * 6, seed=seed), config=config) for seed in range(30)]
    alarms = sum(any(heard_at_least(verdict, "info") for verdict in run) for run in runs)
    assert alarms <= 4  # a detector that errs in 5 % of runs has five or more of 30 in 1.6 % of tries


@pytest.mark.slow
def test_a_fall_of_30_percent_is_found_by_the_second_probe() -> None:
    """16 prompts × 8 samples. 70 % retained lies above the band of `warn`: `info` is the right level, more is wrong."""
    runs = [detect(*simulated_run([0.7] * 2, seed=seed), config=DetectorConfig(resamples=600)) for seed in range(40)]
    assert sum(heard_at_least(verdict, "info") for verdict in runs) >= 32
    assert sum(heard_at_least(verdict, "warn") for verdict in runs) <= 2
