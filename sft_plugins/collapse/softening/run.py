"""The folder of a finished run: which weights it left, what it was asked, and where its baseline is kept.

runs/a/adapter_config.json  or  runs/a/checkpoint-90/…      weights: the folder's own, else the latest checkpoint's
runs/a/collapse/{asked.json, history.jsonl, baseline-….npz}  asked: what the watch kept
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft_plugins.collapse.options import ASKED, read_asked
from sft_plugins.errors import CollapseError

__all__ = ["FinishedRun", "find_run"]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """`weights` is the folder of the adapter or of the full weights, `watch` that of the history."""

    folder: Path
    weights: Path
    kind: Literal["adapter", "full"]
    watch: Path
    asked: dict[str, Any]


def find_run(folder: str | Path, *, watch: str | Path | None = None) -> FinishedRun:
    """What `folder` holds: a training's output folder, or one of its checkpoints.

    Args:
        watch: the folder of the watch's history, where it is not `collapse/` in the output folder.

    Raises:
        CollapseError: `no_run`, `not_asked`.
    """
    folder = Path(folder)
    remedy = "give the output_dir of a training that saved its adapter or its weights, or one of its checkpoints"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CollapseError(f"{folder} {what}; expected a run's output folder", code="no_run", remedy=remedy)
    checkpoints = [
        (int(found[1]), path) for path in folder.iterdir() if (found := _CHECKPOINT.fullmatch(path.name)) is not None
    ]
    places = [folder, *(path for _, path in sorted(checkpoints, reverse=True))]
    weights, kind = next(((path, kind) for path in places if (kind := _kind(path))), (None, None))
    if weights is None or kind is None:
        raise CollapseError(
            f"{folder} holds neither adapter_config.json nor weights, nor does a checkpoint-… in it",
            code="no_run",
            remedy=remedy,
        )
    if watch is not None:
        place = Path(watch)
    else:
        candidates = [folder / "collapse", folder.parent / "collapse"]
        place = next((path for path in candidates if (path / ASKED).is_file()), candidates[0])
    return FinishedRun(folder=folder, weights=weights, kind=kind, watch=place, asked=read_asked(place))


def _kind(folder: Path) -> Literal["adapter", "full"] | None:
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    weights = any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*model*"))
    return "full" if weights and (folder / "config.json").is_file() else None
