"""Intervals over prompts: the right statistic, the right unit, honest at small P."""

import doctest
import itertools

import numpy as np
import pytest

from sft_plugins.collapse.detect import bootstrap
from sft_plugins.collapse.detect.bootstrap import Resampling, holm, mean_difference, pair_mean_difference, ratio


def test_ratio_is_of_means_and_its_draws_are_paired() -> None:
    """A slow bootstrap, one draw at a time, with the same multinomial counts."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.6, 12)
    now = 0.7 * base * np.exp(rng.normal(0, 0.2, 12))
    counts = np.random.default_rng(5).multinomial(12, [1 / 12] * 12, size=2000)
    draws = []
    for row in counts:
        drawn = [p for p, count in enumerate(row) for _ in range(count)]
        draws.append(sum(now[p] for p in drawn) / sum(base[p] for p in drawn))
    found = ratio(now, base, resampling=Resampling(seed=5))
    assert found is not None
    assert found.value == pytest.approx(now.sum() / base.sum())
    # widened beyond the plain 2.5 % and 97.5 % percentiles, and not far beyond
    assert np.quantile(draws, 0.005) < found.lo < np.quantile(draws, 0.025)
    assert np.quantile(draws, 0.975) < found.hi < np.quantile(draws, 0.995)
    assert found.clusters == 12


def test_pairing_takes_the_differences_between_prompts_out() -> None:
    """Prompts differ tenfold, each kept 70 %: paired, that is certain; unpaired it would be ± 0.3."""
    base = np.linspace(0.1, 1.0, 16)
    found = ratio(0.7 * base, base)
    assert found is not None
    assert (found.lo, found.hi) == pytest.approx((0.7, 0.7))
    assert found.p < 1e-6


def test_pair_mean_equals_the_loop_over_pairs_of_different_prompts() -> None:
    rng = np.random.default_rng(0)
    now, base = rng.uniform(size=(2, 6, 6))
    now, base = now + now.T, base + base.T
    np.fill_diagonal(now, np.nan)
    change = now - base
    found = pair_mean_difference(now, base, resampling=Resampling(resamples=300, seed=1))
    assert found is not None
    assert found.value == pytest.approx(np.mean([change[p, q] for p, q in itertools.permutations(range(6), 2)]))
    counts = np.random.default_rng(1).multinomial(6, [1 / 6] * 6, size=300)
    draws = []
    for row in counts:
        drawn = [p for p, count in enumerate(row) for _ in range(count)]
        pairs = [change[p, q] for p, q in itertools.product(drawn, repeat=2) if p != q]
        draws += [np.mean(pairs)] if pairs else []
    assert min(draws) <= found.lo < np.quantile(draws, 0.025)
    assert np.quantile(draws, 0.975) < found.hi <= max(draws)


def test_undefined_prompts_are_left_out_on_both_sides() -> None:
    now, base = np.array([1.0, np.nan, 3.0, 4.0]), np.array([2.0, 2.0, np.nan, 4.0])
    found = ratio(now, base)
    assert found is not None
    assert (found.value, found.clusters) == (pytest.approx(5 / 6), 2)
    matrix = np.arange(9.0).reshape(3, 3)
    gone = matrix.copy()
    gone[1, :] = gone[:, 1] = np.nan
    pairs = pair_mean_difference(matrix + 1, gone)
    assert pairs is not None
    assert (pairs.value, pairs.clusters) == (1.0, 2)


@pytest.mark.parametrize(("now", "base"), [([], []), ([0.3], [0.4]), ([np.nan, 0.3], [0.4, 0.4]), ([0.3, 0.3], [0, 0])])
def test_no_interval_from_fewer_than_two_prompts_or_a_baseline_of_zero(now: list[float], base: list[float]) -> None:
    assert ratio(np.array(now), np.array(base)) is None


def test_draws_whose_baseline_is_zero_say_nothing() -> None:
    """One draw in eleven has none of the prompts with a baseline: 0 ÷ 0, or 0.1 ÷ 0 where a prompt came to vary."""
    base = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    for now in ([0.2, 0.3, 0.0, 0.0, 0.0, 0.0], [0.2, 0.3, 0.01, 0.0, 0.0, 0.0]):
        found = ratio(np.array(now), base)
        assert found is not None
        assert found.value == pytest.approx(sum(now) / 2)
        assert 0.2 <= found.lo <= found.value <= found.hi <= 0.3 + 0.01 * 5
        assert found.p < 0.01


def test_differences_need_two_prompts() -> None:
    assert mean_difference(np.array([1.0]), np.array([0.0]), below=True) is None
    assert pair_mean_difference(np.ones((1, 1)), np.ones((1, 1))) is None
    with pytest.raises(ValueError, match="not the same prompts"):
        ratio(np.zeros(3), np.zeros(4))


def test_the_direction_of_the_p_value_is_the_one_asked_for() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(size=20)
    fell = base - 0.2 + rng.normal(0, 0.05, 20)
    down = mean_difference(fell, base, below=True)
    up = mean_difference(fell, base, below=False)
    assert down is not None
    assert up is not None
    assert down.p < 0.001
    assert up.p > 0.999
    moved = mean_difference(base + 0.1, base, null=0.2, below=False)
    assert moved is not None
    assert moved.p > 0.999


def test_p_and_interval_agree() -> None:
    """A two-sided 95 % interval excludes the null on that side exactly when the one-sided p is under 2.5 %."""
    rng = np.random.default_rng(0)
    agreements = 0
    for _ in range(60):
        base = rng.uniform(0.3, 0.6, 10)
        found = ratio(base * np.exp(rng.normal(-0.12, 0.2, 10)), base)
        assert found is not None
        if abs(found.p - 0.025) > 0.003:  # quantiles interpolate between draws
            assert (found.hi < 1) == (found.p < 0.025)
            agreements += 1
    assert agreements > 40


@pytest.mark.parametrize("prompts", [6, 16])
def test_intervals_cover_the_truth_as_often_as_they_say_even_with_few_prompts(prompts: int) -> None:
    """The plain percentile interval covers 87 % at P = 6; the expanded one 95 % within 3."""
    rng = np.random.default_rng(0)
    covered, plain = [], []
    for _ in range(400):
        base = rng.normal(1, 0.2, prompts)
        change = rng.normal(0.3, 0.1, prompts)
        found = mean_difference(base + change, base, below=True, resampling=Resampling(resamples=1000))
        assert found is not None
        covered.append(found.lo < 0.3 < found.hi)
        draws = change[rng.integers(0, prompts, (1000, prompts))].mean(axis=1)
        plain.append(np.quantile(draws, 0.025) < 0.3 < np.quantile(draws, 0.975))
    assert 0.92 <= np.mean(covered) <= 0.98
    assert np.mean(plain) < np.mean(covered)


def test_holm_golden_values() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_the_same_seed_gives_the_same_interval() -> None:
    base = np.random.default_rng(0).uniform(0.2, 0.6, 9)
    now = base[::-1]
    assert ratio(now, base) == ratio(now, base)
    assert ratio(now, base) != ratio(now, base, resampling=Resampling(seed=1))


def test_the_docstrings_example_holds() -> None:
    result = doctest.testmod(bootstrap)
    assert result.attempted > 0
    assert result.failed == 0
