"""A probe's arrays: comparable with a baseline of another size, whole through JSON, undefined where undefined."""

import json

import numpy as np
import pytest

from sft_plugins.collapse.metrics.diversity import distinct_n, pairwise_distance, self_bleu, vendi_score
from sft_plugins.collapse.metrics.homogeneity import cross_similarity
from sft_plugins.collapse.metrics.per_prompt import Measures, measure

TEXTS = [["hello there you", "hello there me", ""], ["a b c d e", "a b c d e", "q r s t u v"], ["4", "4", "4"]]
TAGS = ["open", "open", "closed"]


def tokens(texts: list[list[str]]) -> list[list[list[str]]]:
    return [[text.split() for text in group] for group in texts]


def vectors(texts: list[list[str]]) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(len(texts), len(texts[0]), 8)))


def test_every_figure_is_that_of_its_function() -> None:
    embeddings = vectors(TEXTS)
    found = measure(TEXTS, tokens(TEXTS), tags=TAGS, embeddings=embeddings, rarefy_to=3, opening_length=2)
    for p, group in enumerate(TEXTS):
        assert found.per_prompt["semantic_distance"][p] == pairwise_distance(embeddings[p])
        assert found.per_prompt["distinct_1"][p] == distinct_n(tokens(TEXTS)[p], 1, tokens=3)
        assert found.per_prompt["self_bleu"][p] == self_bleu(group)
    assert found.cross_similarity is not None
    np.testing.assert_array_equal(found.cross_similarity, cross_similarity(embeddings))
    figures = found.per_prompt
    assert figures["unique"].tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert figures["empty"].tolist() == pytest.approx([1 / 3, 0, 0])
    assert figures["length"].tolist() == pytest.approx([2, 16 / 3, 1])
    assert figures["repetition"][1] == 0
    assert found.opening in {("hello", "there"), ("a", "b")}
    assert (found.samples, found.tags) == (3, ("open", "open", "closed"))


def test_closed_prompts_are_not_asked_about_across_prompts() -> None:
    found = measure(TEXTS, tokens(TEXTS), tags=TAGS)
    for name in ("opening_share", "opening_information", "duplicates"):
        assert np.isfinite(found.per_prompt[name][:2]).all()
        assert np.isnan(found.per_prompt[name][2])
    only_closed = measure(TEXTS, tokens(TEXTS), tags=["closed"] * 3)
    assert only_closed.opening is None
    assert only_closed.mean("opening_share") is None


def test_figures_that_move_with_k_are_taken_from_equally_many_answers() -> None:
    """A baseline of 16 answers against probes of 8: its first 8 count, but for what does not depend on K."""
    rng = np.random.default_rng(0)
    texts = [[" ".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 9))) for _ in range(16)] for _ in range(3)]
    embeddings = list(rng.normal(size=(3, 16, 8)))
    tags = ["open"] * 3
    both = measure(texts, tokens(texts), tags=tags, embeddings=embeddings, equal_k=8)
    first = measure(
        [group[:8] for group in texts],
        [group[:8] for group in tokens(texts)],
        tags=tags,
        embeddings=[rows[:8] for rows in embeddings],
    )
    for name in ("unique", "self_bleu", "vendi", "clusters", "opening_share", "opening_information", "duplicates"):
        np.testing.assert_array_equal(both.per_prompt[name], first.per_prompt[name], err_msg=name)
    for name in ("semantic_distance", "length"):
        assert (both.per_prompt[name] != first.per_prompt[name]).any(), name
    assert both.per_prompt["semantic_distance"][0] == pairwise_distance(embeddings[0])
    assert both.per_prompt["vendi"][0] == vendi_score(_cosines(embeddings[0][:8]))


def _cosines(rows: np.ndarray) -> np.ndarray:
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def test_without_embeddings_or_lengths_there_are_no_such_numbers() -> None:
    found = measure(TEXTS, tokens(TEXTS), tags=TAGS)
    for name in ("semantic_distance", "vendi", "clusters", "truncated"):
        assert np.isnan(found.per_prompt[name]).all()
        assert found.mean(name) is None
    assert found.cross_similarity is None
    cut = measure(TEXTS, tokens(TEXTS), tags=TAGS, truncated=[[True, False, False], [True] * 3, [False] * 3])
    assert cut.mean("truncated") == pytest.approx(4 / 9)
    assert cut.mean("truncated", only_open=True) == pytest.approx(2 / 3)


def test_prompts_without_answers_and_all_empty_answers_are_undefined_not_zero() -> None:
    found = measure(
        [[], ["", ""]], [[], [[], []]], tags=["open", "open"], embeddings=[np.zeros((0, 4)), np.ones((2, 4))]
    )
    assert np.isnan([values[0] for values in found.per_prompt.values()]).all()
    assert np.isnan(found.per_prompt["distinct_1"][1])
    assert np.isnan(found.per_prompt["self_bleu"][1])
    assert found.per_prompt["empty"][1] == 1
    assert found.per_prompt["boilerplate"][1] == 1
    assert found.per_prompt["semantic_distance"][1] == pytest.approx(0)


def test_no_prompts_at_all_have_no_figures() -> None:
    found = measure([], [], tags=[])
    assert (found.samples, found.tags, found.opening, found.mean("unique")) == (0, (), None, None)
    assert {values.shape for values in found.per_prompt.values()} == {(0,)}


def test_measures_survive_json_without_nan_in_the_file() -> None:
    found = measure(TEXTS, tokens(TEXTS), tags=TAGS, embeddings=vectors(TEXTS))
    text = json.dumps(found.to_json(), allow_nan=False)
    back = Measures.from_json(json.loads(text))
    for name, values in found.per_prompt.items():
        np.testing.assert_array_equal(back.per_prompt[name], values, err_msg=name)
    np.testing.assert_array_equal(back.cross_similarity, found.cross_similarity)
    assert (back.tags, back.samples, back.opening) == (found.tags, found.samples, found.opening)


def test_columns_of_other_lengths_and_unknown_tags_are_refused() -> None:
    with pytest.raises(ValueError, match="tags has 2 entries for 3 prompts"):
        measure(TEXTS, tokens(TEXTS), tags=["open", "open"])
    with pytest.raises(ValueError, match=r"unknown prompt tags \['opne'\]; allowed: 'open', 'closed'"):
        measure(TEXTS, tokens(TEXTS), tags=["open", "opne", "open"])
