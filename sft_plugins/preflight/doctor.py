"""Is packing exact on this model, this backend, this machine? Measured, with what happens where nothing is done beside it.

    row without boundaries ─┐
    position ids that restart ─┤                    difference of each document from itself run alone,
    every boundary key ────────┼─► the model as it is ─► relative to the largest logit      ┐
    every key, KV cache on ────┘                                                            ├─► Diagnosis
    every boundary key ───────────► isolate(model) ───► IsolationReport, or why it refuses  ┘

Invariant: documents, reference and tolerance are the probe's own (`packing.isolation.probe`), so every line is measured
against the same thing; the model is left as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sft_plugins.errors import ContaminationError
from sft_plugins.preflight.tiny_model.twin import Twin

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from sft_plugins.packing import Boundaries, IsolationReport, Reference

Verdict = Literal["exact", "leaks", "fails", "unmeasured"]

WAYS = {
    "end_to_end": "one row, documents end to end",
    "position_ids": "position ids that restart",
    "all_keys": "every boundary key",
    "all_keys_cached": "every boundary key, KV cache on",
}
"""How a packed row may be handed to a model that nothing was done to."""


@dataclass(frozen=True)
class Way:
    """What the model as it is makes of a packed row.

    Attributes:
        name: a key of `WAYS`.
        verdict: `exact`; `leaks`, documents get other logits than alone; `fails`, the model raises; `unmeasured`.
        difference: from each document run alone, the largest, relative to the largest logit.
        error: what the model raised.
    """

    name: str
    verdict: Verdict
    difference: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What was measured on one model.

    Attributes:
        model: class of the causal LM. dtype, device, attention: what it ran on.
        twin: what the twin is, None for the model itself.
        ways: the model as it is.
        report: what `isolate` proved; None where it refuses.
        refusal: why it refuses. code: of that error.
        tolerance: what counts as equal, relative to the largest logit; None where nothing could be measured.
    """

    model: str
    dtype: str
    device: str
    attention: str
    twin: str | None
    ways: tuple[Way, ...]
    report: IsolationReport | None
    refusal: str | None
    code: str | None
    tolerance: float | None

    @property
    def exact(self) -> bool:
        """Whether packed rows can be exact here."""
        return self.report is not None

    @property
    def plain(self) -> Verdict:
        """What restarting position ids alone do."""
        return self.way("position_ids").verdict

    @property
    def difference(self) -> float:
        """How far documents packed with position ids alone are from themselves; 0.0 where it was not measured."""
        return self.way("position_ids").difference or 0.0

    @property
    def what(self) -> str:
        """What was measured, in words."""
        subject = f"a narrow twin ({self.twin})" if self.twin else self.model
        return f"{subject} in {self.dtype} on {self.device}, attention {self.attention}"

    def way(self, name: str) -> Way:
        """The measurement of that name."""
        return next((way for way in self.ways if way.name == name), Way(name, "unmeasured"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the fields, and what follows from them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "ways": [dataclasses.asdict(way) for way in self.ways],
            "report": None if self.report is None else self.report.to_dict(),
            "exact": self.exact,
        }


def diagnose(model: nn.Module | Twin) -> Diagnosis:
    """Measure how `model` takes packed rows: as it is, and isolated. It is left as it was.

    Whatever the model's own code raises is a finding, not an error.
    """
    from sft_plugins._models import causal_lm_of
    from sft_plugins._preserve import untouched
    from sft_plugins.packing import isolate, reference_of, set_aside

    net = model.model if isinstance(model, Twin) else model
    about = _about(net, str(model) if isinstance(model, Twin) else None)
    ways: tuple[Way, ...] = ()
    tolerance = None
    try:
        lm = causal_lm_of(net)
    except ContaminationError as error:
        return Diagnosis(**about, ways=(), report=None, refusal=error.message, code=error.code, tolerance=None)
    try:
        with untouched(lm), set_aside(lm):
            reference = reference_of(lm)
            tolerance = reference.tolerance
            ways = tuple(_measure(lm, reference, name) for name in WAYS)
        report = isolate(lm, share_prefixes=True)
        report.undo()
    except ContaminationError as error:
        return Diagnosis(**about, ways=ways, report=None, refusal=error.message, code=error.code, tolerance=tolerance)
    return Diagnosis(**about, ways=ways, report=report, refusal=None, code=None, tolerance=tolerance)


def on_a_gpu(diagnosis: Diagnosis, config: PretrainedConfig) -> list[str]:
    """What would be otherwise on a CUDA device, for a model of this configuration; empty where it was measured on one,
    or where no backend passed."""
    if diagnosis.device.startswith("cuda") or diagnosis.report is None:
        return []
    lines = []
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or getattr(text, "n_head", None)
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    backend = diagnosis.report.backend
    if backend == "varlen" and size is not None and size <= 256 and size % 8 == 0:
        lines.append(
            f"in bfloat16 or float16, `varlen` runs torch's variable-length kernel (head size {size}) in layers without "
            "soft-capping and sinks: one call for all documents, no further package"
        )
    elif backend == "varlen":
        lines.append(
            f"`varlen` stays scaled-dot-product attention, one call per length of document: torch's variable-length "
            f"kernel does not take head size {size or 'unknown'}"
        )
    elif backend == "unpack":
        lines.append(
            "with the linear-attention, scan and convolution kernels listed here, hybrids may pass with `varlen` or "
            "`native`; without them it stays `unpack`"
        )
    lines.append(
        "with attn_implementation=flash_attention_2 or _3 and its package, `native` is tried first: the model's own kernel "
        "told where documents end"
    )
    lines.append(
        "the proof is per machine: other kernels ran here. Run doctor there too; `isolate` repeats the proof when "
        "training starts"
    )
    return lines


def _about(net: nn.Module, twin: str | None) -> dict[str, Any]:
    from sft_plugins._models import lowest_precision

    config = getattr(net, "config", None)
    return {
        "model": type(net).__name__,
        "dtype": str(lowest_precision(net)).removeprefix("torch."),
        "device": str(next(net.parameters()).device),
        "attention": str(getattr(config, "_attn_implementation", None) or "its own"),
        "twin": twin,
    }


def _measure(lm: nn.Module, reference: Reference, name: str) -> Way:
    """One forward of the probe's documents in one row, handed over in the way `name`."""
    import numpy as np
    import torch

    from sft_plugins.packing import Boundaries, logits_of

    boundaries = Boundaries(np.array([document.shape[1] for document in reference.documents]))
    ids = torch.cat(reference.documents, dim=1)
    batch = {"input_ids": ids, **_KEYS[name](boundaries, ids.device)}
    try:
        logits = logits_of(lm, batch)[0].split(boundaries.lengths.tolist())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # model code fails in every way there is
        return Way(name, "fails", error=f"{type(error).__name__}: {_first_line(error)}")
    gaps = [(a - b).abs().max() for a, b in zip(logits, reference.logits, strict=True)]
    # `nan > x` is False: a NaN must count as a difference.
    worst = float(torch.stack(gaps).nan_to_num(torch.inf).max()) / reference.scale
    return Way(name, "exact" if worst <= reference.tolerance else "leaks", worst)


def _end_to_end(boundaries: Boundaries, device: torch.device) -> dict[str, Any]:  # noqa: ARG001
    return {"use_cache": False}


def _position_ids(boundaries: Boundaries, device: torch.device) -> dict[str, Any]:
    return {"position_ids": boundaries.position_ids(device), "use_cache": False}


def _all_keys(boundaries: Boundaries, device: torch.device) -> dict[str, Any]:
    return boundaries.batch(device) | {"use_cache": False}


_KEYS: dict[str, Callable[[Boundaries, torch.device], dict[str, Any]]] = {
    "end_to_end": _end_to_end,
    "position_ids": _position_ids,
    "all_keys": _all_keys,
    "all_keys_cached": lambda boundaries, device: boundaries.batch(device),
}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
