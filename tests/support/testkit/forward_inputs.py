"""What a forward may be given, drawn at random, and what must become of it: exact for all that is said, or refused.

    rows     documents and padding, up to three rows of twelve tokens
    given    positions, mask, keys: each left out, said as meant, or spoiled in one place

Everything given that speaks of documents is read here once more, slowly and by itself. A forward that runs must give every
document that any of them tells what the model without isolation gives it alone; so it can run only where they agree. What
nobody spoiled may not be refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from sft_plugins.errors import SFTPluginsError


@dataclass
class Case:
    """One forward.

    Args:
        rows: of each row, the number of each token's document, −1 for padding.
        given: what the forward is given beside the ids.
        spoiled: the part of it that was changed in one place.
    """

    rows: list[list[int]]
    given: dict[str, Any]
    spoiled: str | None = None

    @property
    def visible(self) -> list[list[bool]]:
        """Which tokens the mask shows."""
        if (mask := self.given.get("attention_mask")) is None:
            return [[True] * len(row) for row in self.rows]
        return [[bool(number) for number in row] for row in mask.tolist()]

    def speakers(self) -> dict[str, list[list[Any]]]:
        """For each part that speaks of documents, what it says of every token."""
        said, width = {}, len(self.rows[0])
        if (positions := self.given.get("position_ids")) is not None:
            said["position_ids"] = positions.reshape(-1, width).expand(len(self.rows), width).tolist()
        if (mask := self.given.get("attention_mask")) is not None and int(mask.max()) > 1:
            said["attention_mask"] = mask.tolist()
        if (ends := self.given.get("cu_seq_lens_q")) is not None:
            flat = [sum(1 for end in ends.tolist() if end <= i) for i in range(len(self.rows) * width)]
            said["cu_seq_lens_q"] = [flat[r * width : (r + 1) * width] for r in range(len(self.rows))]
        if (index := self.given.get("seq_idx")) is not None:
            said["seq_idx"] = index.tolist()
        return said

    def documents(self, speaker: str | None) -> list[tuple[int, int, int]]:
        """Row, first and last visible token of each document that `speaker` tells; None: of each row."""
        found: list[list[int]] = []
        said = self.speakers().get(speaker or "")
        for r, visible in enumerate(self.visible):
            last = None
            for i in (i for i, seen in enumerate(visible) if seen):
                if last is None or (said is not None and not _goes_on(speaker, said[r][last], said[r][i], i - last)):
                    found.append([r, i, i])
                found[-1][2] = last = i
        return [(row, first, last) for row, first, last in found]


def _goes_on(speaker: str | None, before: int, after: int, apart: int) -> bool:
    return after - before in (1, apart) if speaker == "position_ids" else after == before


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Documents in rows, what is said of them, and perhaps one place where it is spoiled."""
    # Hypothesis draws the seed alone: its own draws lean to the simplest value, and would hardly spoil anything.
    chance = draw(st.randoms(use_true_random=True))
    width, rows = chance.randint(1, 12), []
    for _ in range(chance.randint(1, 3)):
        row: list[int] = []
        while len(row) < width:
            length = min(chance.randint(1, 6), width - len(row))
            is_padding = 0 < len(row) == width - length and chance.random() < 0.5
            row += [-1 if is_padding else max(row, default=-1) + 1] * length
        rows.append(row)
    given: dict[str, Any] = {}
    if chance.randint(0, 2):
        start, tail = chance.choice([0, 0, 2]), chance.choice([0, 1, None])
        positions = torch.tensor([_positions(row, start, tail) for row in rows])
        alike = bool((positions == positions[:1]).all())
        form = chance.choice(["full", "row", "1-D"]) if alike else "full"
        given["position_ids"] = {"full": positions, "row": positions[:1], "1-D": positions[0]}[form]
    padded = any(-1 in row for row in rows)
    mask = chance.choice(["segments", "ones", "bool", *([] if padded else ["none", "none", "none"])])
    if mask != "none":
        numbers = torch.tensor(rows) + 1
        kind = torch.bool if mask == "bool" else torch.int64
        given["attention_mask"] = numbers if mask == "segments" else (numbers > 0).to(kind)
    flat = [(r, number) for r, row in enumerate(rows) for number in row]
    if chance.randint(0, 3) == 0:
        ends = [0, *(i for i in range(1, len(flat)) if flat[i] != flat[i - 1]), len(flat)]
        given["cu_seq_lens_q"] = torch.tensor(ends, dtype=torch.int32)
        given |= {"max_length_q": width} if chance.random() < 0.5 else {}
    if chance.randint(0, 3) == 0:
        given["seq_idx"] = torch.tensor(rows, dtype=torch.int32)
    case = Case(rows, given)
    if given and chance.random() < 0.5:
        _spoil(chance, case)
    return case


def _positions(row: list[int], start: int, tail: int | None) -> list[int]:
    """Those of padding all `tail`, or counting on where that is None."""
    positions: list[int] = []
    for index, number in enumerate(row):
        goes_on = index > 0 and (row[index - 1] == number or number < 0)
        positions.append(tail if number < 0 and tail is not None else positions[-1] + 1 if goes_on else start)
    return positions


def _spoil(chance: Random, case: Case) -> None:
    name = chance.choice(sorted(case.given))
    value, case.spoiled = case.given[name], name
    if isinstance(value, int):
        case.given[name] = value - chance.randint(1, 4)
        return
    case.given[name] = value = value.clone()
    at = chance.randrange(value.numel())
    if value.dtype is torch.bool:
        value.view(-1)[at] ^= True
    else:
        value.view(-1)[at] += chance.choice([-2, -1, 1, 2, 7])


@torch.no_grad()
def outcome(isolated: nn.Module, plain: nn.Module, case: Case) -> tuple[str, float]:
    """The code of a refusal, or `ran` and the largest difference of a document that is told from itself alone, relative to
    the largest logit."""
    generator = torch.Generator().manual_seed(len(case.rows) * 100 + len(case.rows[0]))
    ids = torch.randint(4, 90, (len(case.rows), len(case.rows[0])), generator=generator)
    try:
        logits = isolated(input_ids=ids, **case.given).logits
    except SFTPluginsError as error:
        return error.code, 0.0
    except (RuntimeError, IndexError) as error:
        # Not ours: then the model without isolation says the same, of positions [T] for instance.
        return ("ran" if str(error) in _own_error(plain, ids, case) else f"bare {type(error).__name__}: {error}"), 0.0
    worst, scale = 0.0, 1e-6
    positions = case.speakers().get("position_ids")
    for row, first, last in {doc for speaker in (*case.speakers(), *_nobody(case)) for doc in case.documents(speaker)}:
        # Where nobody counts, models with learned positions count what is hidden in front, too.
        start = first if case.speakers() else 0
        seen = torch.tensor([case.visible[row][start : last + 1]])
        own = {} if positions is None else {"position_ids": torch.tensor([positions[row][start : last + 1]])}
        alone = plain(input_ids=ids[row : row + 1, start : last + 1], attention_mask=seen.long(), **own).logits[0]
        differs = (logits[row, start : last + 1] - alone).abs()[seen[0]]
        worst, scale = max(worst, float(differs.max())), max(scale, float(alone.abs().max()))
    return "ran", worst / scale


def _own_error(plain: nn.Module, ids: torch.Tensor, case: Case) -> str:
    try:
        plain(input_ids=ids, **case.given)
    except (RuntimeError, IndexError) as error:
        return str(error)
    return ""


def _nobody(case: Case) -> list[None]:
    """Where nobody speaks of documents, each row is one."""
    return [] if case.speakers() else [None]


def fault(case: Case, what: str, difference: float) -> str | None:
    """What is wrong with an outcome; None if nothing is."""
    if what == "ran":
        return f"silently wrong by {difference:.1e}" if not difference <= 1e-5 else None
    return f"{what}, and nothing contradicts" if case.spoiled is None or what.startswith("bare") else None
