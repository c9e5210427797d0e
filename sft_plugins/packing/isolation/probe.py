"""The experiment that shows whether documents of a packed row see one another, on the very model at hand.

Invariant: under `untouched(model)` it leaves the model, its buffers and modes, and every random generator as they were.

Asked of the model's own logits on made-up documents (`proof/documents.py`):
1. Does each document get in a packed row what it gets alone? In one row, in two, with special ids, in another order, and
   with every limit that the configuration names on both sides (`proof/limits.py`).
2. Does changing every other document leave the rest unchanged?   (catches leaks that are small in effect)
3. Do the weights, and the embeddings of each token, get the gradients that they get from the documents alone?
A control tells whether the experiment could have failed: changing one token must move later logits of its own document,
and must not move earlier ones.

In half precision, and with TF32 products, all of it runs in float32 arithmetic too (`proof/float32.py`), and 1 and 2 as the
model computes: the one proves the code, the other the kernels. Where float32 cannot be had, what changes in 2 must be no
larger than twice what separates a document alone from itself in a padded batch (root mean squares).

Tolerance of 1, relative to the largest logit: in float32 1e-5, or 4 times what separates a document alone from the same
document in an ordinary right-padded batch, if that is more, but never over 1e-4; in half precision 8 and 32 units of that
type's rounding (`torch.finfo(dtype).eps`). Of 2: bit for bit, or, where a backend's sums run in another order (experts,
batched documents), the same tolerance. Of 3: ten times that, relative to each weight's largest gradient.
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from sft_plugins._models import is_sharded, lowest_precision
from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.proof.compare import Measured, compare
from sft_plugins.packing.isolation.proof.documents import documents_for
from sft_plugins.packing.isolation.proof.float32 import HALF, in_float32
from sft_plugins.packing.isolation.proof.limits import refuse_what_reads_the_place
from sft_plugins.packing.isolation.proof.observe import FAILS, Observed, logits_of, observe

__all__ = ["Measured", "Reference", "entrance", "logits_of", "measure", "reference_of"]


@dataclass(frozen=True)
class Reference:
    """What the model says about the documents run alone.

    Args:
        model: the causal LM. run: what was called, and is to be called for comparison (see `entrance`).
        own: in the model's own arithmetic. wide: in float32, where that is another one and could be had.
    """

    model: nn.Module
    run: nn.Module
    own: Observed
    wide: Observed | None
    notes: tuple[str, ...]

    @property
    def documents(self) -> list[torch.Tensor]:
        """int64 [1, l] each: the first row."""
        return self.own.rows[0].documents

    @property
    def logits(self) -> list[torch.Tensor]:
        """float32 [l, V] each."""
        return self.own.rows[0].logits

    @property
    def scale(self) -> float:
        """The largest logit."""
        return self.own.scale

    @property
    def effect(self) -> float:
        """How much one token moves later logits of its own document, relative to `scale`."""
        return self.own.effect

    @property
    def tolerance(self) -> float:
        """What counts as equal in the model's own arithmetic, relative to `scale`."""
        return self.own.tolerance


def entrance(model: nn.Module, lm: nn.Module) -> nn.Module:
    """The module to call for a forward of `lm`, the causal LM inside `model`: `lm`, or the root of FSDP2's sharding.

    `fully_shard` gathers weights in hooks of the modules it was called on. Beneath its root (a PEFT wrapper, as a rule) some
    weights would still be in shards, and the first unit to be called would take itself for the root for good.

    Raises:
        ContaminationError: `sharded`, if `lm` is sharded and the root is not at hand.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return lm
    from torch.distributed.fsdp import FSDPModule

    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    for root in (model, lm):
        if isinstance(root, FSDPModule):
            return root
    if any(isinstance(module, FSDPModule) for module in lm.modules()):
        raise ContaminationError(
            f"the layers of {type(lm).__name__} are sharded by FSDP2, and the model given is not what was sharded",
            code="sharded",
            remedy="pass the model that fully_shard or the trainer took, or isolate it before it is sharded",
        )
    return lm


def reference_of(model: nn.Module, *, run: nn.Module | None = None) -> Reference:
    """Run the probe's documents alone, through a causal LM (unwrapped) that `untouched` holds still.

    Args:
        run: the `entrance` to `model`, where that is another module.

    Raises:
        ContaminationError: `not_causal` if a token moves earlier logits; `probe_blind` if it moves no later ones;
            `row_dependent` if the configuration says that results follow the place in the row; `probe_failed` if the
            model cannot be run on token ids alone.
    """
    run = model if run is None else run
    refuse_what_reads_the_place(model)
    documents = documents_for(model)
    coarse = _is_coarse(model)
    notes: list[str] = []
    wide = None
    if coarse and is_sharded(run):
        notes.append("not seen: what float32 arithmetic would show, since the weights are sharded")
    elif coarse:
        try:
            wide = observe(model, run, documents, in_float32, whole=True, wide=True)
        except (*FAILS, torch.OutOfMemoryError) as error:
            if isinstance(error, ContaminationError):
                raise
            reason = str(error).splitlines()[0][:100] if str(error) else ""
            notes.append(f"not seen: what float32 arithmetic would show ({type(error).__name__}: {reason})")
    try:
        own = observe(model, run, documents, nullcontext, whole=wide is None, wide=False)
    except FAILS as error:
        if isinstance(error, ContaminationError):
            raise
        raise ContaminationError(
            f"{type(model).__name__} could not be run on a plain document: {type(error).__name__}: {error}",
            code="probe_failed",
            remedy="check that the model runs on input_ids alone, on the device it is on",
        ) from error
    return Reference(model, run, own, wide, tuple(notes) + (wide.notes if wide is not None else own.notes))


def measure(reference: Reference) -> Measured:
    """Run the packed rows, in float32 first; what is reported is of the model's own arithmetic."""
    wide = None if reference.wide is None else compare(reference.model, reference.run, reference.wide)
    own = compare(reference.model, reference.run, reference.own)
    if wide is not None and wide.failure is not None:
        return dataclasses.replace(wide, failure=f"in float32 arithmetic {wide.failure}")
    lost_in_rounding = own.touched and own.spread > 2 * reference.own.noise
    if own.failure is None and wide is None and lost_in_rounding and _is_coarse(reference.model):
        failure = (
            f"changing other documents moved {own.touched} tokens by {own.spread:.1e} in the mean, more than twice what "
            f"another layout of the same document does ({reference.own.noise:.1e})"
        )
        return dataclasses.replace(own, failure=failure)
    return own


def _is_coarse(model: nn.Module) -> bool:
    """Whether the model computes so coarsely that a leak could pass for rounding."""
    on_cuda = next(model.parameters()).device.type == "cuda"
    return lowest_precision(model) in HALF or (on_cuda and torch.backends.cuda.matmul.allow_tf32)
