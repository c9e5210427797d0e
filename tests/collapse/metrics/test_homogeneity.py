"""Tier 2 across prompts: the same answer to everything, told apart from the same answer to each."""

import numpy as np
import pytest

from sft_plugins.collapse.metrics.homogeneity import (
    boilerplate_rates,
    commonest_opening,
    cross_similarity,
    duplicates_elsewhere,
    most_informative_length,
    opening_information,
    opening_shares,
    openings,
)
from sft_plugins.collapse.metrics.refusals import BOILERPLATE


def test_cross_similarity_is_the_mean_cosine_between_answers_to_different_prompts() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=(k, 6)) for k in (3, 5, 2)]
    matrix = cross_similarity(groups)
    for p in range(3):
        for q in range(3):
            cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in groups[p] for b in groups[q]]
            assert np.isnan(matrix[p, q]) if p == q else matrix[p, q] == pytest.approx(np.mean(cosines))


def test_a_prompt_without_a_usable_embedding_is_undefined_and_leaves_the_others_alone() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=(3, 6)) for _ in range(4)]
    want = cross_similarity(groups)
    groups[1][0, 0] = np.nan
    groups[2] = np.zeros((0, 6))
    matrix = cross_similarity(groups)
    assert np.isnan(matrix[1]).all()
    assert np.isnan(matrix[:, 2]).all()
    assert matrix[0, 3] == want[0, 3]


def test_openings_are_the_first_tokens_or_all_of_a_short_answer() -> None:
    assert openings([[[1, 2, 3], [1]], [[], [4, 5]]], length=2) == [[(1, 2), (1,)], [(), (4, 5)]]


def test_commonest_opening_is_counted_by_prompt_not_by_answer() -> None:
    found = [[("a",)] * 10, [("b",)], [("b",)]]
    assert commonest_opening(found) == ("b",)
    assert opening_shares(found, ("b",)).tolist() == [0, 1, 1]
    assert commonest_opening([[], []]) is None
    assert np.isnan(opening_shares([[]], None)).all()


def test_information_is_log_p_for_an_opening_of_ones_own_and_zero_for_one_shared_by_all() -> None:
    own = [[(p,)] * 400 for p in range(8)]
    shared = [[("As",)] * 8 for _ in range(8)]
    assert opening_information(own).mean() == pytest.approx(np.log(8), abs=0.02)
    assert opening_information(shared).tolist() == [0] * 8


def test_information_is_not_inflated_by_few_samples() -> None:
    """Openings drawn without regard to the prompt: the plug-in estimate says 1.0 nats, the truth is 0."""
    rng = np.random.default_rng(0)
    corrected, plug_in = [], []
    for seed in range(20):
        found = [[(int(o),) for o in rng.integers(0, 12, size=8)] for _ in range(16)]
        corrected.append(opening_information(found, seed=seed).mean())
        plug_in.append(opening_information(found, permutations=0).mean())
    assert np.mean(plug_in) > 0.4
    assert abs(np.mean(corrected)) < 0.02


def test_information_equals_the_textbook_mutual_information() -> None:
    rng = np.random.default_rng(0)
    found = [[(int(o),) for o in rng.integers(0, 3, size=6)] for _ in range(5)]
    joint = np.zeros((5, 3))
    for p, group in enumerate(found):
        for (o,) in group:
            joint[p, o] += 1 / 30
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    want = (joint[joint > 0] * np.log(joint[joint > 0] / outer[joint > 0])).sum()
    assert opening_information(found, permutations=0).mean() == pytest.approx(want, rel=1e-10)


def test_information_is_seeded() -> None:
    found = [[(p * k % 5,) for k in range(6)] for p in range(6)]
    assert (opening_information(found, seed=3) == opening_information(found, seed=3)).all()
    assert (opening_information(found, seed=3) != opening_information(found, seed=4)).any()


def test_information_of_a_prompt_without_answers_is_undefined() -> None:
    found = opening_information([[("a",)] * 4, [], [("b",)] * 4])
    assert np.isnan(found[1])
    assert (found[[0, 2]] > 0.3).all()
    assert np.isnan(opening_information([[], []])).all()


def test_the_informative_length_is_where_openings_repeat_within_a_prompt() -> None:
    """Openings of two tokens are all new here: nothing could be seen to fall at that length."""
    answers = [[[p, 100 * p + k, k] for k in range(8)] for p in range(6)]
    assert opening_information(openings(answers, length=2)).mean() == pytest.approx(0, abs=1e-9)
    assert most_informative_length(answers) == 1


def test_duplicates_are_those_of_another_prompt() -> None:
    texts = [["Sure!", "sure! ", "a"], ["b", "b", "c"], ["SURE!", "d", "e"], []]
    assert duplicates_elsewhere(texts)[:3].tolist() == pytest.approx([2 / 3, 0, 1 / 3])
    assert np.isnan(duplicates_elsewhere(texts)[3])


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot do that.",
        "Sorry, I am not able to do so.",
        "As an AI language model, I have no opinions.",
        "I can't assist with that request.",
        "Hello! How can I help you today?",
        "",
        " \n",
    ],
)
def test_refusals_and_empty_phrases_are_found(text: str) -> None:
    assert boilerplate_rates([[text]]).tolist() == [1]


@pytest.mark.parametrize(
    "text",
    [
        "I can't wait to tell you about Rome.",
        "Sorry for the long story: it begins in 1912.",
        "AI models learn from data.",
        "You can help a friend by listening.",
        "It was a sorry sight, but I can explain.",
    ],
)
def test_ordinary_answers_are_not_taken_for_refusals(text: str) -> None:
    assert boilerplate_rates([[text]]).tolist() == [0]


def test_patterns_can_be_extended() -> None:
    texts = [["Per company policy, no.", "Yes."], []]
    assert boilerplate_rates(texts, patterns=(*BOILERPLATE, r"company policy"))[0] == 0.5
    assert boilerplate_rates(texts)[0] == 0
    assert np.isnan(boilerplate_rates(texts)[1])
