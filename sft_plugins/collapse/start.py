"""What a run is compared with: the ruler of meaning that suits it, and the baseline, loaded or taken.

Invariant: a half-trained model is never taken for a baseline, and every rank makes the same exchanges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sft_plugins.collapse.distributed import Ranks
from sft_plugins.collapse.history import config_hash
from sft_plugins.collapse.probe.baseline import Baseline, adapter_is_exact, load_baseline
from sft_plugins.collapse.probe.embedder import hidden_states, resolve_embedder
from sft_plugins.collapse.probe.probe import Prober
from sft_plugins.errors import CollapseError

__all__ = ["Start"]

_ADAPTER_EFFECT = 0.02
"""More than rounding in bfloat16 makes of an adapter that does nothing (DoRA divides by a norm and multiplies by it)."""
Record = Mapping[str, Any]


class Start:
    """Finds ruler and baseline of a run that begins, or resumes at `step`.

    Args:
        folder: where baselines are kept; None for nowhere.
        step: 0, or the step that the run resumes from.
        say: how the user is told something.
    """

    def __init__(
        self, prober: Prober, *, ranks: Ranks, folder: Path | None, step: int, say: Callable[[str], None]
    ) -> None:
        self.prober, self.ranks, self.folder, self.step, self.say = prober, ranks, folder, step, say

    def settle(
        self, model: nn.Module, *, embedder: Any, baseline: str | Path | None, before: Sequence[Record]
    ) -> tuple[Baseline | None, str]:
        """The baseline and where it comes from, or None and why there is none. The prober is given its ruler.

        The caller holds `_preserve.untouched`.

        Args:
            embedder, baseline: as in `ModeCollapseCallback`.
            before: what the history holds of the run's earlier part.

        Raises:
            CollapseError: whatever would keep the watcher from watching.
        """
        exact, why = adapter_is_exact(model)
        if exact:
            exact, why = self._began_as_the_base(model, before)
        self.prober.meaning.embedder, note = resolve_embedder(
            embedder, model=model, tokenizer=self.prober.tokenizer, frozen_base=exact
        )
        if note:
            self.say(f"collapse: {note}")
        if embedder == "auto" and exact and self.prober.meaning.embedder is not None:
            self.prober.meaning.fallback = hidden_states(model, self.prober.tokenizer)
        return self._baseline(model, baseline, exact=exact, why=why, before=before)

    def _baseline(
        self, model: nn.Module, choice: str | Path | None, *, exact: bool, why: str, before: Sequence[Record]
    ) -> tuple[Baseline | None, str]:
        if choice is None:
            return None, "baseline=None"
        kind = "adapter_off" if exact else "train_begin"
        fresh = exact or self.step == 0
        identity = self.prober.identity(model, base_only=exact)
        if not fresh:
            del identity["model"]  # the model at hand is half trained
        words = "the base model, adapter off" if exact else f"the model as training began ({why})"
        if choice != "auto":
            loaded = self.ranks.from_first(lambda: load_baseline(Path(choice), identity))
            return dataclasses.replace(loaded, kind=kind), f"{words}; from {Path(choice).name}"
        if not fresh:
            return self.ranks.from_first(lambda: self._resumed(identity, before))
        found = self.ranks.from_first(lambda: self._cached(identity))
        if found is not None:
            return dataclasses.replace(found, kind=kind), f"{words}; from the cache"
        taken = self.prober.take_baseline(model, kind=kind, identity=identity)
        if self.folder is not None and self.ranks.rank == 0:
            taken.save(self.folder)
        return taken, words

    def _began_as_the_base(self, model: nn.Module, before: Sequence[Record]) -> tuple[bool, str]:
        """Whether the adapter changed nothing as training began, and if it did, in what words to say so."""
        kinds = [r["baseline"]["kind"] for r in before if r["kind"] == "run" and r.get("baseline")]
        if self.step:  # the adapter at hand is half trained; the run's earlier part has looked
            return kinds[-1:] != ["train_begin"], "the adapter had changed the base before the run began"
        mine = self.prober.adapter_effect(model)  # on every rank, for weights may be sharded
        effect = self.ranks.from_first(lambda: mine)
        return not effect > _ADAPTER_EFFECT, (
            "the adapter changes the base already: it was trained before, or began as a part of the weights (PiSSA, say)"
        )

    def _cached(self, identity: dict[str, str]) -> Baseline | None:
        path = None if self.folder is None else self.folder / f"baseline-{config_hash(identity)}.npz"
        if path is None or not path.exists():
            return None
        try:
            return load_baseline(path, identity)
        except CollapseError as error:
            self.say(f"collapse: {error}. The baseline is taken again.")
            return None

    def _resumed(self, identity: dict[str, str], before: Sequence[Record]) -> tuple[Baseline | None, str]:
        """A resumed full fine-tuning: the file its first part wrote, or nothing."""
        keys = [r["baseline"]["key"] for r in before if r["kind"] == "run" and r.get("baseline")]
        if self.folder is None or not keys:
            return None, f"the run resumes at step {self.step} and its earlier part left no record of a baseline"
        try:
            loaded = load_baseline(self.folder / f"baseline-{keys[-1]}.npz", identity)
        except CollapseError as error:
            return None, f"the run resumes at step {self.step}, and {error.message}"
        return dataclasses.replace(loaded, kind="train_begin"), "the model as training began; kept by the earlier part"
