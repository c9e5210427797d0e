"""Answers made by hand, whose truth is known: the detector says what is so of them, and nothing else."""

import dataclasses

import numpy as np
import pytest

from sft_plugins.collapse.detect.detector import detect
from sft_plugins.collapse.detect.verdict import Probe
from sft_plugins.collapse.metrics.per_prompt import Measures
from testkit.answer_worlds import World, make_world
from testkit.collapse_runs import detect_each, simulated_run
from testkit.probes import (
    PROMPTS,
    WORDS,
    K,
    answers,
    changed,
    finding,
    probe,
    varied_answers,
    varied_vectors,
)

SAFE = "I am here to help with anything you need ."


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
