"""The proof for rows of trees: every branch gets what its row gets alone, whatever stands beside its path.

    D (19 tokens) ├ 4: a (5 tokens) ─ 7: b (4)     forks at several depths, one of them in a branch
                  └ 14: c (5)
    E (7)         └ 3: d (3)                       a second tree, and a document of one token

Invariant: nothing is said of trees but what was run: forward, with changed siblings, under lowered limits and, where the
documents alone gave gradients, backward.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sft_plugins.packing.isolation.backends.rotary import looks_at_the_row
from sft_plugins.packing.isolation.proof.gradients import Gradients, apart, gradients_of
from sft_plugins.packing.isolation.proof.limits import lowered
from sft_plugins.packing.isolation.proof.observe import Observed, gap, logits_of, weighted
from sft_plugins.packing.isolation.trees import Trees

_SHORT, _SINGLE = 0, 1
"""Indices in the first row of the proof: a document of 7 tokens, one of a single token."""


class _Row:
    """A row of the trees above.

    Args:
        observed: gives the tokens.
        tails: other tokens where no branch sees them. branches: other tokens in the branches that have none, and alone.
    """

    def __init__(self, observed: Observed, *, tails: bool = False, branches: bool = False) -> None:
        documents = observed.rows[0].documents
        longest = max(range(len(documents)), key=lambda index: documents[index].shape[1])
        (d, other_d), (e, other_e), (single, other_single) = (
            (documents[index][0], observed.others[index][0]) for index in (longest, _SHORT, _SINGLE)
        )
        near, far = len(d) // 4, 3 * len(d) // 4
        a = torch.cat([d[near : near + 1], other_d[near + 1 : near + 5]])
        b = torch.cat([a[3:4], other_d[1:4] if branches else d[near + 4 : near + 7]])
        c = torch.cat([d[far : far + 1], (d if branches else other_d)[far + 1 :][:4]])
        e_tail = torch.cat([e[:4], (other_e if tails else e)[4:]])
        root = torch.cat([d[: far + 1], (other_d if tails else d)[far + 1 :]])
        branch = torch.cat([a[:4], d[near + 4 : near + 5] if tails else a[4:]])
        d_branch = torch.cat([e[3:4], e[4:6] if branches else other_e[4:6]])
        # Written out by hand: what is to be proved is how `Trees` finds them.
        before = [d[:0], d[:near], torch.cat([d[:near], a[:3]]), d[:far], e[:0], e[:3], e[:0]]
        self.own = [root, branch, b, c, e_tail, d_branch, other_single if branches else single]
        self.rows = [torch.cat(parts)[None] for parts in zip(before, self.own, strict=True)]
        self.trees = Trees(
            lengths=np.array([len(one) for one in self.own]),
            depths=np.array([len(one) for one in before]),
            parents=np.array([-1, 0, 1, 0, -1, 4, -1]),
        )
        self.before_tails = [far + 1, 4, len(b), len(c), 4, 3, 1]

    def packed(self, run: nn.Module) -> list[torch.Tensor]:
        """float32 [l, V] of each branch's own tokens, in the tree."""
        ids = torch.cat(self.own)[None]
        logits = logits_of(run, {"input_ids": ids, **self.trees.batch(ids.device)})[0]
        return list(logits.split(self.trees.lengths.tolist()))

    def alone(self, run: nn.Module, index: int) -> torch.Tensor:
        """The same of one branch, out of its row alone."""
        return logits_of(run, {"input_ids": self.rows[index]})[0][-len(self.own[index]) :]


def against_trees(model: nn.Module, run: nn.Module, observed: Observed) -> str | None:
    """What stands against rows of trees on a model whose documents are isolated; None where they are exact.

    Args:
        run: what to call for a forward of `model`.
        observed: what the documents say alone, and in which arithmetic.
    """
    if any(looks_at_the_row(module) for module in model.modules()):
        return "rotary frequencies follow the length of a whole row, and what rows share would need several"
    if any(getattr(getattr(module, "config", None), "index_topk", None) for module in model.modules()):
        # Between equal scores `topk` picks by the width of its input, which no row of a proof stands for.
        return (
            "attention goes to the tokens of the highest scores (index_topk), and which of equal ones follows the batch"
        )
    row, indices = _Row(observed), range(7)
    allowed = observed.tolerance * observed.scale
    with observed.arithmetic():
        for limits in [(), *(further.limits for further in observed.rows if further.limits)]:
            with lowered(model, limits):
                packed, alone = row.packed(run), [row.alone(run, index) for index in indices]
            if not (found := gap(packed, alone)) <= allowed:
                where = f", where {', '.join(limits)} is low" if limits else ""
                return f"a branch gets other logits in a tree than alone ({found / observed.scale:.1e}{where})"
        packed = row.packed(run)
        other_tails, other_branches = (
            _Row(observed, tails=True).packed(run),
            _Row(observed, branches=True).packed(run),
        )
        kept = [(packed[i][:n], other_tails[i][:n]) for i, n in enumerate(row.before_tails)]
        kept += [(packed[i], other_branches[i]) for i in (0, 1, 4)]
        if not (found := gap(*(list(side) for side in zip(*kept, strict=True)))) <= allowed:
            return f"what stands beside its path moves the logits of a branch ({found / observed.scale:.1e})"
        if observed.gradients is None:
            return None

        def of_rows(index: int) -> Gradients:
            return gradients_of(model, lambda: weighted(row.alone(run, index), index))

        def of_tree() -> torch.Tensor:
            return torch.stack([weighted(one, index) for index, one in enumerate(row.packed(run))]).sum()

        expected: Gradients = {}
        for index in indices:
            for name, gradient in of_rows(index).items():
                expected[name] = expected[name] + gradient if name in expected else gradient
        worst, where = apart(expected, gradients_of(model, of_tree))
    if worst > 10 * observed.tolerance:
        return f"branches get other gradients in a tree than alone ({where} by {worst:.1e} of its largest)"
    return None
