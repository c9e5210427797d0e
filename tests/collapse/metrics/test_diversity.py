"""Tier 2 within a prompt: golden values, oracles, and the pitfalls each figure is known for."""

import doctest
import itertools
import math

import numpy as np
import pytest
import sacrebleu
from scipy.special import comb

from sft_plugins.collapse.metrics import diversity
from sft_plugins.collapse.metrics.diversity import (
    cosine_kernel,
    distinct_n,
    pairwise_distance,
    repeated_ngrams,
    self_bleu,
    semantic_clusters,
    unique_rate,
    vendi_score,
)


def unit(*angles: float) -> np.ndarray:
    """Unit vectors in the plane at these angles, in degrees."""
    return np.array([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles])


# --- embeddings -----------------------------------------------------------------------------------------------------


def test_pairwise_distance_is_the_mean_over_pairs() -> None:
    rows = np.random.default_rng(0).normal(size=(7, 5))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(rows, 2)]
    assert pairwise_distance(rows) == pytest.approx(1 - np.mean(cosines), rel=1e-12)
    assert pairwise_distance(unit(0, 90)) == pytest.approx(1)
    assert pairwise_distance(unit(30, 30, 30)) == pytest.approx(0, abs=1e-12)


def test_pairwise_distance_does_not_move_with_the_number_of_samples() -> None:
    """What lets 16 baseline samples be compared with 8; Vendi and the plain matrix mean do move."""
    rng = np.random.default_rng(0)
    answers = rng.normal(size=(30, 20)) + rng.normal(size=20)
    drawn = {k: [answers[rng.integers(0, 30, size=k)] for _ in range(3000)] for k in (4, 16)}
    mean = {k: np.mean([pairwise_distance(rows) for rows in groups]) for k, groups in drawn.items()}
    matrix = {k: np.mean([1 - np.mean(cosine_kernel(rows)) for rows in groups]) for k, groups in drawn.items()}
    vendi = {k: np.mean([vendi_score(cosine_kernel(rows)) for rows in groups[:300]]) for k, groups in drawn.items()}
    assert mean[4] == pytest.approx(mean[16], rel=0.02)
    assert matrix[16] > 1.15 * matrix[4]
    assert vendi[16] > 1.5 * vendi[4]


def test_one_answer_has_no_diversity_rather_than_none_at_all() -> None:
    one = unit(10)
    assert pairwise_distance(one) is None
    assert pairwise_distance(np.zeros((0, 4))) is None
    assert self_bleu(["hello"]) is None
    assert vendi_score(cosine_kernel(one)) == pytest.approx(1)
    assert semantic_clusters(one) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_an_embedding_without_direction_makes_the_figures_undefined(bad: float) -> None:
    """Dropping the row instead would hide it, and two rows left could look like agreement."""
    rows = unit(0, 40, 80)
    rows[1] = bad
    assert pairwise_distance(rows) is None
    assert cosine_kernel(rows) is None
    assert vendi_score(cosine_kernel(rows)) is None
    assert semantic_clusters(rows) is None


def test_vendi_golden_values() -> None:
    assert vendi_score(np.eye(5)) == pytest.approx(5, rel=1e-12)
    assert vendi_score(np.ones((5, 5))) == pytest.approx(1, rel=1e-12)
    assert vendi_score(np.array([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]])) == pytest.approx(2.1573004834, abs=1e-10)
    with pytest.raises(ValueError, match="ones on the diagonal"):
        vendi_score(np.zeros((3, 3)))


def test_clusters_hold_only_answers_that_all_say_the_same() -> None:
    """Complete linkage: a chain 0°–30°–60° is no group at cos 40°, though its neighbours are."""
    near = math.cos(math.radians(40))
    assert semantic_clusters(unit(0, 5, 90, 95), similarity=near) == 2
    assert semantic_clusters(unit(0, 30, 60), similarity=near) == 2
    assert semantic_clusters(unit(0, 120, 240), similarity=near) == 3
    assert semantic_clusters(unit(5, 5, 5)) == 1
    assert semantic_clusters(unit(0, 60), similarity=0.5) == 1  # exactly at the threshold


# --- wording ---------------------------------------------------------------------------------------------------------


def test_distinct_golden_values() -> None:
    answers = [text.split() for text in ("i am going", "i am going", "lets go i i")]
    assert [distinct_n(answers, n) for n in (1, 2, 3)] == pytest.approx([0.5, 0.714286, 0.75], abs=1e-6)


def test_ngrams_never_cross_answers() -> None:
    assert distinct_n([["a"], ["b"]], 2) is None
    assert distinct_n([["a", "b"], ["c"]], 2) == 1.0


def test_rarefaction_is_the_mean_over_all_draws_without_replacement() -> None:
    words = list("aaabbcd")
    for m in range(1, 8):
        draws = [len(set(draw)) / m for draw in itertools.combinations(words, m)]
        assert distinct_n([words], 1, tokens=m) == pytest.approx(np.mean(draws), rel=1e-12)


def test_rarefaction_equals_its_formula_with_exact_binomials() -> None:
    counts = [40, 25, 10, 3, 1, 1]
    words = [word for word, count in enumerate(counts) for _ in range(count)]
    for m in (1, 7, 40, 80):
        exact = sum(1 - comb(80 - c, m, exact=True) / comb(80, m, exact=True) for c in counts) / m
        assert distinct_n([words], 1, tokens=m) == pytest.approx(exact, rel=1e-10)


def test_rarefied_distinct_does_not_fall_with_length_where_plain_and_adjusted_do() -> None:
    """500 → 8000 tokens of the same Zipf source. EAD (Liu et al. 2022) assumes equally likely words, text has none."""
    rng = np.random.default_rng(0)
    odds = 1 / np.arange(1, 20_001) ** 1.05
    text = rng.choice(20_000, size=(6, 8000), p=odds / odds.sum()).tolist()
    short = [row[:500] for row in text]
    plain = [np.mean([distinct_n([row], 1) for row in rows]) for rows in (short, text)]
    rarefied = [np.mean([distinct_n([row], 1, tokens=500) for row in rows]) for rows in (short, text)]
    adjusted = [np.mean([_expectation_adjusted(row, 20_000) for row in rows]) for rows in (short, text)]
    assert plain[0] == pytest.approx(0.56, abs=0.06)
    assert plain[1] == pytest.approx(0.31, abs=0.06)
    assert abs(rarefied[1] - rarefied[0]) < 0.01
    assert adjusted[1] < 0.8 * adjusted[0]


def _expectation_adjusted(tokens: list[int] | list[str], vocabulary: int) -> float:
    return len(set(tokens)) / (vocabulary * (1 - ((vocabulary - 1) / vocabulary) ** len(tokens)))


def test_expectation_adjusted_golden_value() -> None:
    """The comparison above is with the published figure."""
    assert _expectation_adjusted(["a", "b", "c", "a"], 10) == pytest.approx(0.8723466, abs=1e-7)


def test_distinct_has_no_number_where_there_are_too_few_ngrams() -> None:
    assert distinct_n([[], []], 1) is None
    assert distinct_n([["a", "b"]], 1, tokens=3) is None
    assert distinct_n([["a", "b"]], 1, tokens=2) == 1.0
    with pytest.raises(ValueError, match="n must be at least 1"):
        distinct_n([["a"]], 0)


def test_self_bleu_is_sacrebleu_with_all_others_as_references() -> None:
    texts = ["the cat sat on the mat", "a cat sat on the mat today", "dogs bark at night, loudly"]
    want = [
        sacrebleu.sentence_bleu(text, [other for other in texts if other is not text], use_effective_order=True).score
        for text in texts
    ]
    assert self_bleu(texts) == pytest.approx(np.mean(want), rel=1e-12)


@pytest.mark.parametrize("text", ["the same answer every time", "Yes.", "ok"])
def test_identical_answers_score_100_however_short(text: str) -> None:
    """Without effective order a two-token answer scores under 100 against its own copy."""
    assert self_bleu([text] * 4) == pytest.approx(100)


def test_empty_answers_are_answers_but_have_no_wording() -> None:
    assert self_bleu(["", "  "]) is None
    assert self_bleu(["", "yes it is so"]) == pytest.approx(0)
    assert unique_rate(["", "", "a"]) == pytest.approx(2 / 3)
    assert unique_rate([]) is None


def test_unique_rate_ignores_case_and_white_space() -> None:
    assert unique_rate(["Yes,  it is.\n", "yes, it is.", "no"]) == pytest.approx(2 / 3)


def test_meaning_narrows_while_wording_varies_more() -> None:
    """C8: paraphrases of one answer, told apart by every lexical figure, held together by meaning."""
    varied = ["one two three four", "one two three five", "six two three four", "one seven three four"]
    paraphrases = ["alpha beta gamma delta", "epsilon zeta eta theta", "iota kappa lambda mu", "nu xi omicron pi"]
    before, after = unit(0, 50, 100, 150), unit(0, 2, 4, 6)
    bleu = self_bleu(varied), self_bleu(paraphrases)
    distinct = [distinct_n([text.split() for text in texts], 1) for texts in (varied, paraphrases)]
    assert bleu[1] < bleu[0]  # type: ignore[operator]
    assert distinct[1] > distinct[0]  # type: ignore[operator]
    assert pairwise_distance(after) < 0.1 * pairwise_distance(before)  # type: ignore[operator]


# --- degeneration ----------------------------------------------------------------------------------------------------


def test_repeated_ngrams_tell_a_loop_from_text() -> None:
    assert repeated_ngrams(["a", "b", "c", "d", "e", "f", "g", "h"]) == 0
    assert repeated_ngrams(["no"] * 100) == pytest.approx(1 - 1 / 97)
    assert repeated_ngrams(["a", "b", "c"]) is None


def test_the_docstrings_example_holds() -> None:
    result = doctest.testmod(diversity)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_distance_of_identical_answers_is_zero_never_a_hair_below() -> None:
    found = [
        pairwise_distance(np.repeat(np.random.default_rng(seed).normal(size=(1, 384)).astype(np.float32), 4, axis=0))
        for seed in range(50)
    ]
    assert min(found) >= 0
    assert max(found) < 1e-6
