"""Tier 1: entropies, on the right positions, in bounded memory, never a number where there is none."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from sft_plugins.collapse.metrics.entropy import (
    TokenStatistics,
    compare,
    concatenate,
    fork_positions,
    grouped_sums,
    kl_from_cached,
    summarize,
    supervised_positions,
    token_statistics_from_logits,
)


def naive(logits: torch.Tensor, targets: torch.Tensor, base: torch.Tensor | None = None) -> dict[str, list[float]]:
    """One token at a time, float64, straight from the definitions."""
    out: dict[str, list[float]] = {"entropy": [], "nll": [], "top1": [], "kl": []}
    for i, row in enumerate(logits.double().tolist()):
        largest = max(row)
        weights = [math.exp(x - largest) for x in row]
        total = sum(weights)
        p = [weight / total for weight in weights]
        out["entropy"].append(-sum(x * math.log(x) for x in p if x > 0))
        out["nll"].append(-math.log(p[targets[i]]))
        out["top1"].append(max(p))
        if base is not None:
            q = base[i].double().softmax(-1).tolist()
            out["kl"].append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0))
    return out


def test_golden_entropies() -> None:
    stats = token_statistics_from_logits(torch.tensor([[2.0, 1, 0, -1], [0, 0, 0, 0]]), torch.tensor([0, 3]))
    assert stats.entropy.tolist() == pytest.approx([0.947536964, 1.386294361], abs=1e-6)
    assert stats.nll[1] == pytest.approx(math.log(4), abs=1e-6)
    assert stats.top1[1] == 0.25
    assert stats.kl_now_base is None


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_every_figure_equals_the_naive_one_at_any_chunk(chunk: int) -> None:
    torch.manual_seed(0)
    logits, base, targets = torch.randn(11, 50) * 4, torch.randn(11, 50) * 4, torch.randint(50, (11,))
    stats = token_statistics_from_logits(logits, targets, base_logits=base, chunk=chunk)
    want = naive(logits, targets, base)
    for got, name in zip((stats.entropy, stats.nll, stats.top1, stats.kl_now_base), want, strict=True):
        assert got is not None
        assert got.tolist() == pytest.approx(want[name], rel=1e-5, abs=1e-6), name


def test_half_precision_logits_are_summed_in_float32() -> None:
    """bf16 sums over 50k entries would be off by several percent."""
    torch.manual_seed(0)
    logits = (torch.randn(2, 50_000) * 3).bfloat16()
    stats = token_statistics_from_logits(logits, torch.tensor([0, 1]))
    want = naive(logits, torch.tensor([0, 1]))
    assert stats.entropy.tolist() == pytest.approx(want["entropy"], rel=1e-5)


def test_kl_is_zero_against_itself_and_positive_otherwise() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 30)
    same = token_statistics_from_logits(logits, torch.zeros(6, dtype=torch.long), base_logits=logits)
    other = token_statistics_from_logits(logits, torch.zeros(6, dtype=torch.long), base_logits=torch.randn(6, 30))
    assert same.kl_now_base is not None
    assert other.kl_now_base is not None
    assert same.kl_now_base.abs().max() < 1e-6
    assert other.kl_now_base.min() > 0.01


# --- positions (C1) -------------------------------------------------------------------------------------------------


def test_positions_are_shifted_and_supervised_only() -> None:
    """C1: entropy averaged over wrong or padded positions."""
    labels = torch.tensor([[-100, -100, 7, 8, -100, 9], [1, 2, -100, -100, -100, -100]])
    where = supervised_positions(labels)
    assert where.row.tolist() == [0, 0, 0, 1]
    assert where.column.tolist() == [1, 2, 4, 0]
    assert where.target.tolist() == [7, 8, 9, 2]
    assert where.offset.tolist() == [0, 1, 0, 0]


def test_offsets_equal_a_walk_along_each_row() -> None:
    rng = np.random.default_rng(0)
    labels = torch.tensor(np.where(rng.random((30, 17)) < 0.4, -100, 5))
    want = []
    for row in labels.tolist():
        run = 0
        for label in row[1:]:
            run = 0 if label == -100 else run + 1
            want += [run - 1] if run else []
    assert supervised_positions(labels).offset.tolist() == want


def test_mean_entropy_is_weighted_by_token_over_supervised_positions() -> None:
    """C1: hand value; a long uncertain answer weighs more than a short certain one, prompt and padding nothing."""
    peaked, flat = [50.0, 0, 0, 0], [0.0, 0, 0, 0]
    logits = torch.tensor([[flat, peaked, flat, flat], [flat, flat, flat, flat]])
    # row 0 predicts one token (from position 1, peaked); row 1 three (flat); position 3 of either predicts nothing
    labels = torch.tensor([[-100, -100, 0, -100], [-100, 0, 0, 0]])
    where = supervised_positions(labels)
    stats = token_statistics_from_logits(logits[where.row, where.column], where.target)
    summary = summarize(stats)
    assert summary.tokens == 4
    assert summary.entropy == pytest.approx(3 / 4 * math.log(4), abs=1e-6)


def test_batches_concatenated_give_the_mean_over_all_tokens() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 20), torch.randint(20, (9,))
    parts = [token_statistics_from_logits(logits[a:b], targets[a:b]) for a, b in ((0, 2), (2, 2), (2, 9))]
    whole = summarize(token_statistics_from_logits(logits, targets))
    assert summarize(concatenate(parts)).entropy == pytest.approx(whole.entropy, rel=1e-6)
    assert summarize(concatenate(parts)).tokens == 9


def test_entropy_by_position_takes_the_first_tokens_apart() -> None:
    stats = TokenStatistics(torch.tensor([4.0, 2, 1, 8, 3]), torch.zeros(5), torch.zeros(5))
    summary = summarize(stats, offsets=torch.tensor([0, 1, 2, 0, 5]), first=3)
    assert summary.entropy_by_position == (6.0, 2.0, 1.0)
    assert summary.entropy_rest == 3.0
    assert summarize(stats, offsets=torch.ones(5, dtype=torch.long), first=2).entropy_by_position[0] is None


# --- no token, no number (C6); not-a-number is said ------------------------------------------------------------------


def test_no_supervised_token_gives_no_number() -> None:
    """C6: an all-masked batch must not log entropy 0."""
    where = supervised_positions(torch.full((2, 5), -100))
    assert len(where.row) == 0
    stats = token_statistics_from_logits(torch.zeros(0, 9), where.target)
    summary = summarize(stats, offsets=where.offset, first=2)
    assert summary.tokens == summary.nonfinite == 0
    assert (summary.entropy, summary.nll, summary.gap, summary.top1) == (None, None, None, None)
    assert summary.entropy_by_position == (None, None)
    assert summary.entropy_rest is None
    assert summarize(concatenate([])).entropy is None
    both = compare(stats, stats)
    assert (both.entropy_ratio, both.fork_retention) == (None, None)
    assert kl_from_cached(np.array([]), np.array([])) is None


def test_nan_and_infinite_logits_are_counted_and_not_averaged() -> None:
    logits = torch.zeros(5, 4)
    logits[1, 2] = torch.nan
    logits[2, 0] = torch.inf
    logits[3] = -torch.inf
    summary = summarize(token_statistics_from_logits(logits, torch.zeros(5, dtype=torch.long)))
    assert (summary.tokens, summary.nonfinite) == (2, 3)
    assert summary.entropy == pytest.approx(math.log(4), abs=1e-6)


def test_nan_in_either_model_is_seen_in_the_divergence() -> None:
    now, base = torch.zeros(3, 4), torch.zeros(3, 4)
    now[0, 1], base[1, 1] = torch.nan, torch.nan
    stats = token_statistics_from_logits(now, torch.zeros(3, dtype=torch.long), base_logits=base)
    assert stats.finite.tolist() == [False, False, True]


def test_vocabulary_masked_by_minus_infinity_adds_nothing() -> None:
    """Padded vocabularies are masked so; 0 · log 0 is 0."""
    logits = torch.tensor([[1.0, 0.5, -torch.inf, -torch.inf]])
    stats = token_statistics_from_logits(logits, torch.tensor([0]), base_logits=logits)
    small = token_statistics_from_logits(logits[:, :2], torch.tensor([0]))
    assert stats.entropy.item() == pytest.approx(small.entropy.item(), rel=1e-6)
    assert stats.kl_now_base is not None
    assert stats.kl_now_base.item() == pytest.approx(0, abs=1e-7)
    assert stats.finite.all()


# --- against the baseline --------------------------------------------------------------------------------------------


def test_gap_is_zero_for_a_calibrated_model_and_grows_with_overconfidence() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(6), size=20_000)
    targets = torch.tensor((rng.random((20_000, 1)) > p.cumsum(1)).sum(1).clip(max=5))
    logits = torch.tensor(np.log(p))
    honest = summarize(token_statistics_from_logits(logits, targets)).gap
    sharpened = summarize(token_statistics_from_logits(2 * logits, targets)).gap
    assert honest is not None
    assert sharpened is not None
    assert abs(honest) < 0.02
    assert sharpened > 0.3


def test_forks_are_the_top_fifth_of_the_baselines_entropy() -> None:
    entropy = torch.tensor([0.1, 3.0, 0.2, 2.0, 0.0, 0.0, 0.0, 0.0, torch.nan, 5.0, 0.1])
    assert fork_positions(entropy).nonzero()[:, 0].tolist() == [1, 9]  # ⌈0.2 · 10⌉ of the finite ones
    assert fork_positions(torch.zeros(10)).nonzero()[:, 0].tolist() == [0, 1]  # ties: the earlier ones, never all
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
        fork_positions(entropy, share=0)


def test_fork_retention_sees_what_the_mean_drowns() -> None:
    base = TokenStatistics(torch.tensor([0.5] * 8 + [4.0, 4.0]), torch.zeros(10), torch.zeros(10))
    now = TokenStatistics(torch.tensor([0.75] * 8 + [1.0, 1.0]), torch.zeros(10), torch.zeros(10))
    found = compare(now, base)
    assert (found.tokens, found.fork_tokens) == (10, 2)
    assert found.fork_retention == pytest.approx(0.25)
    assert found.entropy_ratio == pytest.approx(8 / 12)


def test_comparing_different_tokens_is_refused() -> None:
    one, two = (TokenStatistics(torch.zeros(n), torch.zeros(n), torch.zeros(n)) for n in (1, 2))
    with pytest.raises(ValueError, match="not the same rows"):
        compare(one, two)


def test_fork_sums_by_pair_have_no_number_for_a_pair_without_forks() -> None:
    sums = grouped_sums(torch.tensor([1.0, 2, 4, torch.nan]), torch.tensor([0, 0, 2, 3]), 4)
    assert sums[[0, 2]].tolist() == [3, 4]
    assert np.isnan(sums[[1, 3]]).all()
    masked = grouped_sums(torch.tensor([1.0, 2]), torch.tensor([0, 0]), 1, where=torch.tensor([False, True]))
    assert masked.tolist() == [2]


def test_kl_from_cached_log_probabilities_estimates_the_exact_divergence() -> None:
    rng = np.random.default_rng(0)
    base, now = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
    drawn = rng.choice(3, size=50_000, p=base)
    exact = float((base * np.log(base / now)).sum())
    assert kl_from_cached(np.log(base)[drawn], np.log(now)[drawn]) == pytest.approx(exact, abs=0.02)
    assert kl_from_cached([-1.0, -np.inf, np.nan], [-1.5, -1.0, -1.0]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="not the same samples"):
        kl_from_cached(np.zeros(2), np.zeros(3))


def test_logits_of_a_whole_batch_are_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match="supervised_positions"):
        token_statistics_from_logits(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))


# --- memory (C7) -----------------------------------------------------------------------------------------------------

_MEMORY = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from sft_plugins.collapse.probe.teacher_forcing import LabelledText, judge_rows
torch.set_num_threads(1)
rows, vocabulary = int(sys.argv[1]), 150_000
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).bfloat16().eval()
ids = tuple(torch.randint(vocabulary, (513,)).tolist())
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
with torch.no_grad():
    judged = judge_rows(model, [LabelledText(ids, (-100, *ids[1:]))] * rows, range(rows))
assert judged.stats.finite.all() and len(judged.stats.nll) == rows * 512
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="ru_maxrss counts bytes there")
def test_entropy_of_4k_tokens_over_150k_entries_fits_in_one_gigabyte() -> None:
    """C7: the naive float32 log-softmax of this batch alone is 2.4 GB; as a probe reads it, in a fresh process."""
    run = subprocess.run([sys.executable, "-c", _MEMORY, "8"], capture_output=True, text=True, check=True)
    above = int(run.stdout)
    assert above < 1e9, f"{above / 1e9:.2f} GB"


@pytest.mark.parametrize("tokens", [5, 50, 500])
def test_softmax_sees_no_more_than_what_fills_a_chunk(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """C7: whatever the number of tokens, and with the same numbers as all at once."""
    torch.manual_seed(0)
    logits, targets = torch.randn(tokens, 100), torch.randint(100, (tokens,))
    base = torch.randn(tokens, 100)
    whole = token_statistics_from_logits(logits, targets, base_logits=base, chunk=tokens)
    sizes: list[int] = []

    def spy(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return part

    monkeypatch.setattr("sft_plugins.collapse.metrics.entropy._CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr("sft_plugins.collapse.metrics.entropy._upcast", spy)
    parts = token_statistics_from_logits(logits, targets, base_logits=base)
    assert max(sizes) == min(tokens, 10)
    for name in ("entropy", "nll", "top1", "kl_now_base"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-6, atol=1e-6)
