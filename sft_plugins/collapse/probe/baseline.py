"""The model that training started from, as a probe sees it: its answers, its certainty, its vectors. Taken once.

| where it comes from | kind | holds |
| --- | --- | --- |
| new adapter on a frozen base | `adapter_off` | the base itself, at any time; needs an adapter that changes nothing else |
| anything else | `train_begin` | the model at `on_train_begin` of a fresh run; afterwards only what was kept on disk |

Invariant: a baseline is what it says it is. The file carries an identity (model, tokenizer and template, prompts,
    sampling, evaluation pairs), and a file of another identity is refused. A resumed full fine-tuning without its
    file has no baseline: the half-trained model is never taken for one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sft_plugins._files import whole_or_not_at_all
from sft_plugins.collapse.history import config_hash
from sft_plugins.collapse.metrics.entropy import TokenStatistics
from sft_plugins.collapse.probe.sampling import Sample
from sft_plugins.collapse.probe.teacher_forcing import Judged
from sft_plugins.errors import CollapseError

__all__ = ["MIN_SAMPLES", "Baseline", "adapter_is_exact", "identity_of", "load_baseline", "model_fingerprint"]

MIN_SAMPLES = 16
"""Answers per prompt at least: every later probe is compared with this one draw."""
_SAMPLED_VALUES = 4096
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """`identity` names what it is of, part by part; `seconds` is what taking it cost; `problem` says why not to use
    it.
    """

    kind: str
    identity: dict[str, str]
    samples: tuple[Sample, ...]
    frozen: Judged
    held_out: Judged | None
    embeddings: np.ndarray | None
    embedder: str | None
    seconds: float
    problem: str | None = None

    @property
    def key(self) -> str:
        """What its file is called by."""
        return config_hash(self.identity)

    def save(self, folder: Path) -> Path:
        """Write `baseline-<key>.npz` whole or not at all, and return its path. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        meta = {
            "format": _FORMAT,
            "kind": self.kind,
            "identity": self.identity,
            "samples": [dataclasses.asdict(s) for s in self.samples],
            "embedder": self.embedder,
            "seconds": self.seconds,
            "problem": self.problem,
        }
        arrays = {"meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **_arrays("frozen", self.frozen)}
        if self.held_out is not None:
            arrays |= _arrays("held_out", self.held_out)
        if self.embeddings is not None:
            arrays["embeddings"] = self.embeddings
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        target = folder / f"baseline-{self.key}.npz"
        with whole_or_not_at_all(target) as draft:
            draft.write_bytes(buffer.getvalue())
        return target


def load_baseline(path: Path, expected: dict[str, str]) -> Baseline:
    """The baseline in `path`, if it is of what is expected.

    Args:
        expected: the parts of its identity that can be checked. Without `"model"` the model is taken on trust: a
            resumed
            full fine-tuning has only the half-trained one at hand.

    Raises:
        CollapseError: `baseline_missing`, `baseline_broken`, `baseline_mismatch` (naming the parts that differ).
    """
    if not path.is_file():
        raise CollapseError(
            f"there is no baseline file {str(path)!r}",
            code="baseline_missing",
            remedy="pass the baseline-….npz that an earlier run left in its output_dir, or {baseline:baseline='auto'}",
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays["meta"].tobytes())
        if meta["format"] != _FORMAT:
            raise ValueError(f"format {meta['format']}, this version reads {_FORMAT}")
        samples = tuple(Sample(**{**s, "token_ids": tuple(s["token_ids"])}) for s in meta["samples"])
        baseline = Baseline(
            kind=meta["kind"],
            identity=meta["identity"],
            samples=samples,
            frozen=_judged("frozen", arrays),
            held_out=_judged("held_out", arrays) if "held_out/row" in arrays else None,
            embeddings=arrays.get("embeddings"),
            embedder=meta["embedder"],
            seconds=meta["seconds"],
            problem=meta["problem"],
        )
    except Exception as error:  # a cut file may fail anywhere in zip, NumPy or JSON
        raise CollapseError(
            f"{path} is not a baseline of this library: {error}",
            code="baseline_broken",
            remedy="remove the file; a new run takes its baseline again",
        ) from error
    differing = [part for part, value in expected.items() if baseline.identity.get(part) != value]
    if differing:
        raise CollapseError(
            f"the baseline {path.name} differs from this run in: {', '.join(differing)}",
            code="baseline_mismatch",
            remedy="{baseline_file:pass the file} that belongs to this model and these prompts, or {baseline:baseline='auto'}",
        )
    return baseline


def identity_of(
    model: nn.Module,
    tokenizer: Any,
    *,
    encoded: Sequence[Sequence[int]],
    sampling: dict[str, Any],
    held_out: Sequence[Any] | None,
    base_only: bool,
) -> dict[str, str]:
    """A hash for each part of what a baseline depends on.

    Args:
        encoded: the prompts' token ids, which hold the rendered template.
        sampling: everything that decides what is drawn.
        base_only: leave the adapter's own weights out.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {
        "model": model_fingerprint(model, base_only=base_only),
        "tokenizer": config_hash([tokenizer.chat_template, vocabulary]),
        "prompts": config_hash([list(ids) for ids in encoded]),
        "sampling": config_hash(sampling),
        "eval_pairs": config_hash([[r.input_ids, r.labels] for r in held_out] if held_out else None),
    }


def model_fingerprint(model: nn.Module, *, base_only: bool) -> str:
    """Hash of every weight's name, shape, type and up to 4096 of its values, evenly spaced, as they are in memory.

    Not every byte: a 70-billion-parameter model would take minutes. An optimizer step moves nearly every value of
    nearly every trainable tensor, and other models differ everywhere.
    """
    digest = hashlib.sha256()
    adapters = _adapter_parameters(model) if base_only else frozenset()
    for name, parameter in model.named_parameters():
        if name in adapters:
            continue
        plain = name.replace(".base_layer", "").replace(".original_module", "").removeprefix("base_model.model.")
        values = parameter.detach().reshape(-1)
        values = values[:: max(1, -(-values.numel() // _SAMPLED_VALUES))].contiguous().cpu()
        digest.update(f"{plain} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def adapter_is_exact(model: nn.Module) -> tuple[bool, str]:
    """Whether the model with its adapter off is the model before training, and if not, why.

    It is where every trainable weight belongs to an adapter, since training then moves nothing else. PEFT's `bias`
    option and weights unfrozen by hand break that. Whether the adapter began as nothing is for the model to show
    (`teacher_forcing.adapter_effect`).
    """
    if not hasattr(model, "disable_adapter"):
        return False, "the model has no adapter"
    adapters = _adapter_parameters(model)
    others = [name for name, p in model.named_parameters() if p.requires_grad and name not in adapters]
    if others:
        return False, f"training also moves weights outside the adapter, {others[0]} for one"
    return True, ""


def _adapter_parameters(model: nn.Module) -> frozenset[str]:
    """Parameters that PEFT added: of its tuner layers, and the trainable copies of `modules_to_save`."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", None) or "lora_"
    added = (prefix, "modules_to_save", "trainable_tokens_")
    return frozenset(n for n, _ in model.named_parameters() if any(p.startswith(added) for p in n.split(".")))


def _arrays(name: str, judged: Judged) -> dict[str, np.ndarray]:
    stats = {k: v.numpy() for k, v in vars(judged.stats).items() if v is not None}
    return {f"{name}/{k}": v for k, v in {**stats, "row": judged.row.numpy(), "offset": judged.offset.numpy()}.items()}


def _judged(name: str, arrays: dict[str, np.ndarray]) -> Judged:
    fields = {k.removeprefix(name + "/"): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(name + "/")}
    row, offset = fields.pop("row"), fields.pop("offset")
    return Judged(TokenStatistics(**fields), row, offset)
