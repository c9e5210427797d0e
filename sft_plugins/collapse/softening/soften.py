"""`soften`: how much of its training a collapsed model can give back, measured, and the model that keeps the rest.

WiSE-FT (Wortsman et al., arXiv 2109.01903; for reasoning models arXiv 2504.10478): the straight line from the base to the
tuned weights often holds places with the gain of training and the variety of the base. No training is needed to look.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft_plugins._files import whole_or_not_at_all
from sft_plugins._preserve import untouched
from sft_plugins._report import plain
from sft_plugins.collapse.detect.verdict import DetectorConfig
from sft_plugins.collapse.distributed import Ranks
from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.probe.baseline import Baseline, load_baseline
from sft_plugins.collapse.probe.probe import Look, Prober
from sft_plugins.collapse.probe.prompts import load_prompts
from sft_plugins.collapse.softening.adapter import AdapterDial, read_config
from sft_plugins.collapse.softening.run import FinishedRun, find_run
from sft_plugins.collapse.softening.tradeoff import Tradeoff, checked_shares, measure_tradeoff
from sft_plugins.collapse.softening.weights import WeightsDial
from sft_plugins.collapse.start import Start
from sft_plugins.errors import CollapseError

__all__ = ["Softened", "soften"]

_SAME_MODEL = 0.5
"""Nats per token of surprise at the recorded baseline's answers that another precision may cost the same model."""
_CHECKED_ROWS = 3


@dataclass(frozen=True, kw_only=True)
class Softened:
    """What was measured, and what was written, if anything was."""

    tradeoff: Tradeoff
    run: Path
    weights: Path
    kind: str
    output: Path | None
    """The folder with the softened model; None where none is recommended."""
    check: dict[str, float] | None
    """How far what was written, loaded again, is from λ·BA (or θ0 + λ(θ − θ0))."""
    notes: tuple[str, ...]
    origin: str
    """What was compared with."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dict(plain({**dataclasses.asdict(self), "tradeoff": self.tradeoff.to_json()}))


def soften(
    run: str | Path,
    *,
    at: Sequence[float] | None = None,
    base_model: str | Path | None = None,
    output_dir: str | Path | None = None,
    watch: str | Path | None = None,
    embedder: Any = None,
    device: str = "cpu",
    show: bool = False,
    advance: Callable[[str], None] = lambda _: None,
) -> Softened:
    """Measure a finished run at shares λ of its training, and write the largest λ that is healthy and costs no held-out loss.

    Args:
        run: a training's output folder, watched by `ModeCollapseCallback`, or one of its checkpoints.
        at: shares λ in [0, 1]; 1, 3/4, 1/2 and 1/4 if left out. 1 is always among them.
        base_model: folder or hub id of the model that training started from; None for the one that the run names.
        output_dir: for the softened model; None for `<run>/softened`. An existing folder must be empty.
        watch: folder of the watch's history; None for `<run>/collapse`.
        embedder: what tells meanings apart, as for `ModeCollapseCallback`; None for what the run used.
        show: whether progress bars are shown.
        advance: called with a few words at each step.

    Returns:
        What was measured at each λ with its intervals, the recommendation, and where the softened model lies.

    Raises:
        CollapseError: `bad_share`, `no_run`, `not_asked`, `output_exists`, `not_lora`, `lora_variant`, `adapter_file`,
            `base_model`, `wrong_base`, `not_equal`. Nothing is written then.
    """
    shares = checked_shares(at)
    found = find_run(run, watch=watch)
    target = Path(output_dir) if output_dir is not None else found.folder / "softened"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CollapseError(
            f"{target} exists and is not empty; nothing is overwritten",
            code="output_exists",
            remedy="give another folder as --output",
        )
    notes: list[str] = []
    advance("loading the model")
    dial, tokenizer = _load(found, base_model, device)
    advance("looking at the base")
    prober, base, origin = _prepare(dial, tokenizer, found, embedder, notes, show=show)
    bands = DetectorConfig(**found.asked["detector"])
    tradeoff = measure_tradeoff(
        dial, prober, base, shares, config=bands, advance=lambda share: advance(f"measuring at λ = {share:g}")
    )
    output = check = None
    if tradeoff.outcome == "recommended" and tradeoff.recommended is not None:
        advance("writing and checking the softened model")
        rows = [*prober.encoded[:_CHECKED_ROWS], *(row.input_ids for row in prober.rows[:_CHECKED_ROWS])]
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_not_at_all(target) as draft:
            dial.write(tradeoff.recommended, draft)
            check = dial.check(tradeoff.recommended, draft, rows)
        output = target
    return Softened(
        tradeoff=tradeoff,
        run=found.folder,
        weights=found.weights,
        kind=found.kind,
        output=output,
        check=check,
        notes=tuple(notes),
        origin=origin,
    )


def _load(found: FinishedRun, base_model: str | Path | None, device: str) -> tuple[AdapterDial | WeightsDial, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = base_model or found.asked["model"]
    if found.kind == "adapter":
        named = named or read_config(found.weights).get("base_model_name_or_path")
    if not named:
        raise CollapseError(
            f"{found.folder} does not say which model training started from",
            code="base_model",
            remedy="name it: --base, a folder or a hub id",
        )
    dtype = getattr(torch, found.asked["dtype"] or "float32")

    def model(place: str | Path) -> Any:
        try:
            return AutoModelForCausalLM.from_pretrained(str(place), dtype=dtype).to(device)
        except Exception as error:  # no such folder, no network, a file cut short: each library has its own
            raise CollapseError(
                f"{place} cannot be loaded: {type(error).__name__}: {str(error)[:300]}",
                code="base_model",
                remedy="give the model that training started from as --base, a folder or a hub id",
            ) from error

    if found.kind == "adapter":
        read_config(found.weights)  # before gigabytes are loaded for what is refused
        dial: AdapterDial | WeightsDial = AdapterDial(model(named), found.weights)
    else:
        dial = WeightsDial(model(named), model(found.weights), found.weights)
    own = (found.weights / "tokenizer_config.json").is_file()
    try:
        return dial, AutoTokenizer.from_pretrained(str(found.weights if own else named))
    except Exception as error:
        raise CollapseError(
            f"no tokenizer can be loaded from {found.weights if own else named}: {error}",
            code="base_model",
            remedy="save the tokenizer beside the adapter, as the trainer does",
        ) from error


def _prepare(
    dial: AdapterDial | WeightsDial, tokenizer: Any, found: FinishedRun, embedder: Any, notes: list[str], *, show: bool
) -> tuple[Prober, Look, str]:
    """The watch's probe as the run had it, and its baseline: the recorded one where the base at hand is what it was."""
    asked, model = found.asked, dial.model
    choice = asked["embedder"] if embedder is None else embedder
    if choice == "custom":
        raise CollapseError(
            "the run's meanings were told apart by a function of yours, which no file can hold",
            code="embedder",
            remedy="pass it in Python, soften(…, embedder=…), or name a sentence-transformers model as --embedder",
        )
    prober = Prober(
        model,
        tokenizer,
        load_prompts(asked["prompts"]),
        eval_pairs=[{"input_ids": ids, "labels": labels} for ids, labels in asked["held_out"]] or None,
        max_eval_pairs=max(1, len(asked["held_out"])),
        samples_per_prompt=asked["samples_per_prompt"],
        max_new_tokens=asked["max_new_tokens"],
        seed=asked["seed"],
        patterns=asked["patterns"],
        stop_ids=asked["stop_token_ids"],
        show=show,
    )
    prober.autocast = None if asked["autocast"] is None else getattr(torch, asked["autocast"])
    start = Start(prober, ranks=Ranks(), folder=found.watch, step=0, say=notes.append)
    dial.turn(0.0)
    with untouched(model, tokenizer):
        _same_base(prober, model, found, notes)
        taken, origin = start.settle(model, embedder=choice, baseline="auto", before=[])
        base = prober.use_baseline(taken, DetectorConfig(**asked["detector"]))
    assert base is not None  # "auto" at step 0 always gives one
    return prober, base, origin


def _same_base(prober: Prober, model: Any, found: FinishedRun, notes: list[str]) -> None:
    """Hold the base at hand against what the run recorded of its own.

    Raises:
        CollapseError: `wrong_base`, where it is another model altogether.
    """
    recorded = _recorded(found)
    identity = prober.identity(model, base_only=hasattr(model, "disable_adapter"))
    if recorded is None or recorded.identity == identity:
        return
    parts = ", ".join(part for part, value in identity.items() if recorded.identity.get(part) != value)
    if not {"prompts", "tokenizer"} & set(parts.split(", ")):
        surprise = prober.surprise(model, recorded)
        if surprise > _SAME_MODEL:
            raise CollapseError(
                f"the base at hand is another model than the run's: what that one answered surprises it by {surprise:.2f} "
                "nats per token more",
                code="wrong_base",
                remedy="give the model that training started from as --base",
            )
    notes.append(
        f"the base at hand is not bit for bit what the run recorded (it differs in: {parts}), so the baseline was taken again"
    )


def _recorded(found: FinishedRun) -> Baseline | None:
    try:
        (*_, head) = (r for r in read_history(found.watch / "history.jsonl") if r["kind"] == "run")
        return load_baseline(found.watch / f"baseline-{head['baseline']['key']}.npz", {}) if head["baseline"] else None
    except (
        CollapseError
    ):  # the folder holds what was asked, but no more: then there is nothing to hold the base against
        return None
