"""What confirms a finding, which bands give its level, and when narrowing is a tax that buys nothing."""

from collections.abc import Sequence

import numpy as np
import pytest

from sft_plugins.collapse.detect.bootstrap import Estimate
from sft_plugins.collapse.detect.detector import detect
from sft_plugins.collapse.detect.verdict import DetectorConfig, Verdict
from sft_plugins.collapse.metrics.per_prompt import Measures
from sft_plugins.errors import CollapseError
from testkit.collapse_runs import detect_each
from testkit.probes import PROMPTS, changed, finding, probe, scaled

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
