"""Make packed rows exact for a model, then prove it on that model.

Invariant: `isolate` returns only if the probe found every document unmoved by the others and equal to itself run alone;
otherwise it raises with what was measured, and the model is as it was.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn

from sft_plugins._models import causal_lm_of, lowest_precision
from sft_plugins._preserve import untouched, without_autocast
from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.backends.native import Native, has_linear_kernels, uses_flash_attention
from sft_plugins.packing.isolation.backends.unpack import Unpack
from sft_plugins.packing.isolation.backends.varlen import IMPLEMENTATION, Varlen
from sft_plugins.packing.isolation.changes import proving
from sft_plugins.packing.isolation.forward import Backend, install, installed_backend, proved
from sft_plugins.packing.isolation.probe import Measured, Reference, entrance, measure, reference_of
from sft_plugins.packing.isolation.proof.trees import against_trees

BACKENDS = ("auto", "varlen", "native", "unpack")


@dataclass(frozen=True)
class IsolationReport:
    """What was proved, on what, and how. Deltas are relative to the largest logit.

    Usable as a context manager that takes the isolation off at its end.

    Args:
        backend: `varlen`, `native`, `unpack`, or `none` for a model that was checked as it came.
        model: class of the causal LM.
        dtype: coarsest type it computes in; device: where.
        attention: its attention implementation, which its config goes on naming.
        packed_attention: the implementation that serves packed rows.
        documents: lengths of the probe's documents.
        alone_delta: largest difference between a document packed and alone.
        perturbed_delta: largest change in a document when the others were changed; 0.0 is bit for bit.
        leaked: tokens that changed by more than `tolerance` then.
        tolerance: what counts as equal; see `probe`.
        effect: how much a token moves later logits of its own document: what a leak would look like.
        notes: what the probe did not cover, what stands against trees, and why faster backends were passed over.
        seconds: time taken by setting up and proving.
        prefix_trees: whether rows of trees (`pack_dataset(share_prefixes=True)`) were proved exact too.
    """

    backend: str
    model: str
    dtype: str
    device: str
    attention: str
    packed_attention: str
    documents: tuple[int, ...]
    alone_delta: float
    perturbed_delta: float
    leaked: int
    tolerance: float
    effect: float
    notes: tuple[str, ...]
    seconds: float
    prefix_trees: bool = False
    _undo: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def undo(self) -> None:
        """Take this isolation off, and no other: one that it was put over is in charge again. The second time nothing
        happens."""
        if self._undo is not None:
            self._undo()

    def __enter__(self) -> IsolationReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the way back, as JSON takes it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "_undo"}
        return values | {"documents": list(self.documents), "notes": list(self.notes)}

    def __str__(self) -> str:
        same = "bit for bit" if self.perturbed_delta == 0 else f"within {self.perturbed_delta:.1e}"
        lines = [
            f"{self.model} ({self.dtype}, {self.device}): documents isolated, backend {self.backend}",
            f"  attention       {self.attention}, for packed rows {self.packed_attention}",
            f"  packed vs alone {self.alone_delta:.1e} of the largest logit (allowed {self.tolerance:.1e})",
            f"  others changed  0 tokens moved, {same} (a token of its own document moves it by {self.effect:.1e})",
            f"  documents       {', '.join(map(str, self.documents))} tokens, {self.seconds:.2f} s",
        ]
        if self.prefix_trees:
            lines.append("  prefix trees    every branch as its row alone, forward and backward")
        return "\n".join(lines + [f"  note            {note}" for note in self.notes])


def isolate(model: nn.Module, *, backend: str = "auto", share_prefixes: bool = False) -> IsolationReport:
    """Make packed rows exact for `model`, and prove it.

    After this, in every forward with document boundaries (`cu_seq_lens_q/k`, `seq_idx` or restarting `position_ids`)
    the logits, loss and gradients of each document are those of the document run alone. Every other forward is the
    model's own. Batches may come from this library, TRL's `packing=True`, transformers' flattening collator or
    Axolotl's multipack.

    Args:
        model: a causal LM, bare or inside PEFT, DDP, FSDP2 or `torch.compile`, isolated before or not: the last isolation
            is in charge until it is undone.
        backend: `auto` takes the first that passes the probe of `native` (where the model's own kernels may do it),
            `varlen`, `unpack`.
        share_prefixes: prove rows of trees too. The report's `prefix_trees` says whether they are exact; where they are not,
            a note says why, and a forward that is given one raises.

    Raises:
        ContaminationError: `contaminated`, if no backend passes; other codes for models that cannot be packed.
        ValueError: for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; allowed are {', '.join(map(repr, BACKENDS))}")
    started = time.perf_counter()
    lm = causal_lm_of(model)
    run = entrance(model, lm)
    rejected: list[str] = []
    with untouched(lm), without_autocast(lm), proving():
        reference = reference_of(lm, run=run)
        for candidate in _candidates(lm, backend):
            undo = install(lm, candidate)
            try:
                measured = _try(reference, rejected, candidate.name)
                if measured is not None:
                    proved(lm, _prove_again)
                    found = _report(lm, candidate.name, reference, measured, tuple(rejected), started, undo)
                    return _with_trees(found, candidate, reference) if share_prefixes else found
            except BaseException:
                undo()
                raise
            undo()
    raise ContaminationError(
        f"no backend isolates the documents of {type(lm).__name__}: " + "; ".join(rejected),
        code="contaminated",
        remedy="{no_packing:train this model without packing}"
        if backend in ("auto", "unpack")
        else "use backend='auto'",
    )


def check_isolation(model: nn.Module, *, share_prefixes: bool = False) -> IsolationReport:
    """Prove that packed rows are exact for `model` as it is, changing nothing.

    Args:
        share_prefixes: prove rows of trees too, as `isolate` does.

    Raises:
        ContaminationError: `contaminated`, with what was measured; other codes for models that cannot be packed.
    """
    started = time.perf_counter()
    lm = causal_lm_of(model)
    run = entrance(model, lm)
    backend = installed_backend(lm)
    name = "none" if backend is None else backend.name
    rejected: list[str] = []
    with untouched(lm), without_autocast(lm), proving():
        reference = reference_of(lm, run=run)
        measured = _try(reference, rejected, name)
        if measured is None:
            raise ContaminationError(
                f"packed rows are not exact for {type(lm).__name__}: " + "; ".join(rejected),
                code="contaminated",
                remedy="call isolate(model)",
            )
        proved(lm, _prove_again)
        found = _report(lm, name, reference, measured, (), started, None)
        return _with_trees(found, backend, reference) if share_prefixes and backend is not None else found


def _prove_again(lm: nn.Module) -> None:
    try:
        backend = installed_backend(lm)
        check_isolation(lm, share_prefixes=backend is not None and backend.trees)
    except ContaminationError as error:
        raise ContaminationError(
            f"the model was changed since it was isolated: {error.message}",
            code=error.code,
            remedy="call isolate(model) when all adapters are on it, or take off what was put on",
        ) from error


def _candidates(lm: nn.Module, backend: str) -> list[Backend]:
    on_accelerator = next(lm.parameters()).device.type != "cpu"
    if backend == "native":
        return [Native()]
    if backend == "unpack":
        return [Unpack(), Unpack(padding=False)]
    # Hybrids pass the keys on to their linear-attention kernels; everything else is served without.
    varlen: list[Backend] = (
        [Varlen(), Varlen(keep_keys=True)] if on_accelerator and has_linear_kernels() else [Varlen()]
    )
    if backend == "varlen":
        return varlen
    native: list[Backend] = [Native()] if uses_flash_attention(lm) else []
    return [*native, *varlen, Unpack(), Unpack(padding=False)]


def _with_trees(report: IsolationReport, backend: Backend, reference: Reference) -> IsolationReport:
    """The report, with what rows of trees came to; the backend takes such rows only if they are exact."""
    started = time.perf_counter()
    if backend.keep_keys:
        against: str | None = "the model's own kernels know of no paths"
    else:
        backend.trees = True
        try:
            against = against_trees(reference.model, reference.run, reference.wide or reference.own)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # model code fails in every way there is
            against = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}"
        finally:
            backend.trees = False
    backend.trees = against is None
    notes = report.notes if against is None else (*report.notes, f"no trees (share_prefixes): {against}")
    seconds = report.seconds + time.perf_counter() - started
    return dataclasses.replace(report, prefix_trees=against is None, notes=notes, seconds=seconds)


def _try(reference: Reference, rejected: list[str], name: str) -> Measured | None:
    """What was measured if it proves isolation; else None, and the reason joins `rejected`."""
    try:
        measured = measure(reference)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # model code fails in every way there is; none of them is isolation
        rejected.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}")
        return None
    if measured.failure is not None:
        rejected.append(
            f"{name}: {measured.failure} (packed vs alone {measured.alone_delta:.1e}, others changed "
            f"{measured.perturbed_delta:.1e}, allowed {reference.tolerance:.1e} of the largest logit)"
        )
        return None
    return measured


def _report(
    lm: nn.Module,
    backend: str,
    reference: Reference,
    measured: Measured,
    rejected: tuple[str, ...],
    started: float,
    undo: Callable[[], None] | None,
) -> IsolationReport:
    attention = str(getattr(lm.config, "_attn_implementation", "none"))
    return IsolationReport(
        backend=backend,
        model=type(lm).__name__,
        dtype=str(lowest_precision(lm)).removeprefix("torch."),
        device=str(next(lm.parameters()).device),
        attention=attention,
        packed_attention=IMPLEMENTATION if backend == "varlen" else attention,
        documents=tuple(document.shape[1] for document in reference.documents),
        alone_delta=measured.alone_delta,
        perturbed_delta=measured.perturbed_delta,
        leaked=measured.leaked,
        tolerance=reference.tolerance,
        effect=reference.effect,
        notes=reference.notes + tuple(f"passed over {reason}" for reason in rejected),
        seconds=time.perf_counter() - started,
        _undo=undo,
    )
