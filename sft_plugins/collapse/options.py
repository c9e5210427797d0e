"""What the user asks of the watch, checked once. The history records it, and `asked.json` beside it keeps what is needed to
ask the same again after training.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_plugins._files import whole_or_not_at_all
from sft_plugins._options import bad_option, whole_number, whole_number_or_none
from sft_plugins._report import plain
from sft_plugins.collapse.detect.verdict import DetectorConfig
from sft_plugins.collapse.history import config_hash
from sft_plugins.collapse.probe.probe import Prober
from sft_plugins.collapse.probe.prompts import Prompt
from sft_plugins.errors import CollapseError

__all__ = ["ASKED", "WatchOptions", "figures_hash", "keep_asked", "read_asked"]

ASKED = "asked.json"
_ASKED_SCHEMA = 1

ON_COLLAPSE = ("warn", "stop")
_DECIDE_FIGURES = ("prompts", "samples_per_prompt", "max_new_tokens", "seed", "max_eval_pairs")


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """The keyword arguments of `ModeCollapseCallback`, which describes them.

    Raises:
        CollapseError: `bad_option`.
    """

    eval_pairs: Any
    every_steps: int | None
    samples_per_prompt: int
    max_new_tokens: int
    baseline: str | Path | None
    embedder: Any
    on_collapse: str | Callable[[Any], Any]
    output_dir: str | Path | None
    seed: int
    budget: float | None
    max_eval_pairs: int
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    patterns: tuple[str, ...]
    stop_token_ids: Sequence[int] | None
    report: bool

    def __post_init__(self) -> None:
        whole_number(
            "samples_per_prompt", self.samples_per_prompt, CollapseError, least=2,
            remedy="one answer per prompt has no variety to measure",
        )  # fmt: skip
        whole_number("max_new_tokens", self.max_new_tokens, CollapseError)
        whole_number("max_eval_pairs", self.max_eval_pairs, CollapseError)
        whole_number_or_none("every_steps", self.every_steps, CollapseError)
        if self.budget is not None and not 0 < self.budget <= 1:
            raise bad_option(
                "budget", self.budget, "a share in (0, 1], or None", CollapseError,
                remedy="{budget:pass 0.03 for 3% of the wall time, None for no limit}",
            )  # fmt: skip
        if not callable(self.on_collapse) and self.on_collapse not in ON_COLLAPSE:
            raise bad_option(
                "on_collapse", self.on_collapse, "'warn', 'stop', or a callable", CollapseError,
                remedy="to do something of your own, pass a function of the verdict",
            )  # fmt: skip

    @property
    def of_probes(self) -> dict[str, Any]:
        """What `Prober` is given."""
        return {
            "eval_pairs": self.eval_pairs,
            "max_eval_pairs": self.max_eval_pairs,
            "samples_per_prompt": self.samples_per_prompt,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "patterns": self.patterns,
            "stop_ids": self.stop_token_ids,
        }

    def record(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What decides the run's figures, as the history holds it."""
        return plain(
            {
                "max_eval_pairs": self.max_eval_pairs,
                "samples_per_prompt": self.samples_per_prompt,
                "max_new_tokens": self.max_new_tokens,
                "seed": self.seed,
                "patterns": self.patterns,
                "prompts": config_hash([prompt.definition for prompt in prompts]),
                "stop_token_ids": None if self.stop_token_ids is None else sorted(self.stop_token_ids),
                "every_steps": self.every_steps,
                "budget": self.budget,
                "embedder": self.embedder if isinstance(self.embedder, (str, type(None))) else "custom",
                "baseline": None if self.baseline is None else str(self.baseline),
                "on_collapse": "callable" if callable(self.on_collapse) else self.on_collapse,
            }
        )


def figures_hash(run: Mapping[str, Any]) -> str:
    """Of a `run` record: a hash of what its figures can be compared under. Probes of another hash belong to another run.

    Budgets, cadence and patterns of refusals may change from one part of a run to the next.
    """
    config = run["config"]
    return config_hash([[config.get(name) for name in _DECIDE_FIGURES], run["embedder"], run["eval_pairs"]])


def keep_asked(folder: Path, prober: Prober, options: WatchOptions, detector: DetectorConfig, model: Any) -> None:
    """Write `asked.json` into `folder`: what `read_asked` gives back. Raises OSError."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), None)
    asked = {
        "schema": _ASKED_SCHEMA,
        "model": getattr(model.config, "_name_or_path", None) or None,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "autocast": None if prober.autocast is None else str(prober.autocast).removeprefix("torch."),
        "prompts": [{**prompt.row, "tag": prompt.tag} for prompt in prober.prompts],
        "held_out": [[row.input_ids, row.labels] for row in prober.rows],
        "samples_per_prompt": prober.k,
        "max_new_tokens": prober.generation.max_new_tokens,
        "stop_token_ids": list(prober.generation.eos_token_id or ()) or None,
        "seed": prober.seed,
        "patterns": prober.patterns,
        "embedder": options.record(prober.prompts)["embedder"],
        "detector": dataclasses.asdict(detector),
    }
    with whole_or_not_at_all(folder / ASKED) as draft:
        draft.write_text(json.dumps(plain(asked), default=str), encoding="utf-8")


def read_asked(folder: Path) -> dict[str, Any]:
    """What `keep_asked` wrote into `folder`.

    Raises:
        CollapseError: `not_asked`, where there is none, or none that can be read.
    """
    path = folder / ASKED
    remedy = "give the run of a training that was watched by this version; runs of 0.1.0 kept no record of what they were asked"
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
        if asked["schema"] != _ASKED_SCHEMA:
            raise ValueError(f"it has schema {asked['schema']}, this version reads {_ASKED_SCHEMA}")
    except OSError as error:
        raise CollapseError(
            f"{folder} does not hold what the watch asked: {path.name}: {error.strerror or error}",
            code="not_asked",
            remedy=remedy,
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CollapseError(f"{path} cannot be read: {error}", code="not_asked", remedy=remedy) from error
    return dict(asked)
