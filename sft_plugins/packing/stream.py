"""Packing a stream: bounded memory, the same rows every time, resumable in the middle.

Invariant: the documents of the packed rows are those of the stream, each once (but for what a named policy drops or
cuts, counted); and a stream that was stopped and resumed yields exactly the rows that it would have yielded.

    read buffer_size documents → plan_packs → yield the packs → read the next …      the last buffer may be short
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from sft_plugins._options import one_of, whole_number
from sft_plugins.errors import PackingError
from sft_plugins.packing.distributed.shares import Share, host_of_this_pass, numbered_rows, share_of_this_process
from sft_plugins.packing.documents import Document, Policies, admitted_documents, join
from sft_plugins.packing.plan import check_capacity, plan_packs
from sft_plugins.packing.prefix_tree.buffer import FoldedBuffer, check_sharing
from sft_plugins.packing.report import PackReport, Tally

FAST_FORWARD = ("replay", "state")


def pack_stream(
    rows: Iterable[Mapping[str, Any]],
    max_length: int,
    *,
    buffer_size: int = 10_000,
    overflow: str = "raise",
    unsupervised: str = "raise",
    extra_columns: str = "raise",
    seed: int | None = 0,
    share_prefixes: bool = False,
    fast_forward: str = "replay",
) -> PackStream:
    """Pack the masked rows of any iterable, `buffer_size` documents at a time, each buffer as `pack_dataset` would.

    Rows come as `input_ids`, `labels` (NumPy, integer type of the source) and `seq_lengths` (int32). With 10,000
    documents per buffer the rows are a fraction of a per cent more than planning all of them together would give.

    Args:
        rows: mappings with `input_ids` and `labels` (lists, NumPy or tensors): a `datasets.IterableDataset`, a list, a
            generator. An iterator can be packed once; anything else gives a new pass for every `iter(stream)`.
        max_length, overflow, unsupervised, extra_columns: as for `pack_dataset`. Row numbers in errors and in the
            report count the rows of `rows` from 0.
        buffer_size: documents held in memory, those of one plan.
        seed: shuffles equal lengths and the packs of each buffer, differently in every buffer and epoch (`set_epoch`).
        share_prefixes: as for `pack_dataset`, within each buffer: rows of one conversation come together, and share.
        fast_forward: how `load_state_dict` finds its place in `rows`. `"replay"` iterates over them from the start and
            discards what was consumed: exact for every source that repeats itself (shuffles need a fixed seed).
            `"state"` hands `rows.load_state_dict` the state that `rows.state_dict()` gave: quick, and as exact as the
            source is (`datasets` refills shuffle buffers with other rows, and 4.8 loses its place in filtered streams).

    Raises:
        PackingError: `bad_option`, `bad_capacity` here; while iterating, with the row, those of `pack_dataset`, and
            `consumed`, `workers`, `bad_state`, `empty_dataset`.

    Example:
        >>> documents = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
        >>> stream = pack_stream(documents, 8)
        >>> [row["seq_lengths"].tolist() for row in stream]
        [[3, 2]]
    """
    return PackStream(
        rows,
        _Options(
            max_length=check_capacity(max_length),
            buffer_size=buffer_size,
            overflow=overflow,
            unsupervised=unsupervised,
            extra_columns=extra_columns,
            seed=seed,
            share_prefixes=share_prefixes,
            fast_forward=fast_forward,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Options:
    max_length: int
    buffer_size: int
    overflow: str
    unsupervised: str
    extra_columns: str
    seed: int | None
    share_prefixes: bool
    fast_forward: str

    def __post_init__(self) -> None:
        whole_number("buffer_size", self.buffer_size, PackingError)
        check_sharing(self.share_prefixes, ())
        one_of("fast_forward", self.fast_forward, FAST_FORWARD, PackingError)
        self.policies  # noqa: B018  refuses what it does not know

    @cached_property
    def policies(self) -> Policies:
        return Policies(
            capacity=self.max_length,
            overflow=self.overflow,
            unsupervised=self.unsupervised,
            extra_columns=self.extra_columns,
        )


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a pass stands: `yielded` packs into buffer number `buffer`."""

    buffer: int = 0
    yielded: int = 0
    share: tuple[int, int] | None = None
    """Which part of the rows was read, and of how many; None at the beginning of a pass."""
    source: Any = None
    """What `rows.state_dict()` gave at the start of the buffer; None when replaying."""
    tally: dict[str, Any] = field(default_factory=lambda: Tally().to_dict())
    """The tally at the start of the buffer; its `rows_in` are the rows to skip when replaying."""


class PackStream(IterableDataset[dict[str, Any]]):
    """The packed rows of a stream; see `pack_stream`.

    A torch `IterableDataset`, so that a DataLoader and `transformers.Trainer` take it as it is; TRL wants
    `datasets.IterableDataset.from_generator(lambda: iter(stream))`. Under several workers every document is packed once:
    workers divide a list, a data set, or the shards of a `datasets.IterableDataset`; behind `from_generator`, which gives all
    of a generator to one worker, that one packs all rows.

    `state_dict()` says where the latest pass stands, after the row it yielded last; `load_state_dict(state)` makes the
    next pass begin there. The state holds no documents: the buffer it lies in is read again and planned again.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], options: _Options) -> None:
        stateful = hasattr(rows, "state_dict") and hasattr(rows, "load_state_dict")
        if options.fast_forward == "state" and not stateful:
            raise PackingError(
                f"fast_forward='state' needs rows with a state; {type(rows).__name__} has none",
                code="bad_option",
                remedy="use fast_forward='replay'",
            )
        self._rows, self._options = rows, options
        # Seen by workers, persistent ones too, and by the process that started them.
        self._epoch, self._worker_passes = (torch.zeros(1, dtype=torch.int64).share_memory_() for _ in range(2))
        self._next = self._place = _Place()
        self._tally = Tally()
        self._opened = False
        self._first_state = self._source_state()

    @property
    def report(self) -> PackReport:
        """What the latest pass has done so far; rows waiting in the buffer count in `rows_in` and `tokens_in` only.

        Of passes in this process: the workers of a DataLoader count in theirs.
        """
        return self._tally.report(self._options.max_length)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the next pass anew; handed on to a source that knows epochs. A state of another epoch is dropped.

        A pass that a `datasets.IterableDataset` draws from adds that data set's epoch to this one.
        """
        if epoch != int(self._epoch):
            self._next = _Place()
        self._epoch.fill_(epoch)
        if hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the latest pass stands, as plain data (JSON-able if the state of the source is).

        Raises:
            PackingError: `workers`, if workers of a DataLoader have read the rows, and this process does not know how far.
        """
        if int(self._worker_passes) and get_worker_info() is None and not self._opened:
            raise PackingError(
                "workers of a DataLoader have read the rows, and their places are not known in this process",
                code="workers",
                remedy="take the state where the rows are read: num_workers=0, or torchdata's StatefulDataLoader",
            )
        return {"epoch": int(self._epoch), "options": asdict(self._options), "place": asdict(self._place)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass, and only that one, begin where `state` was taken.

        Raises:
            PackingError: `bad_state` if the state comes from a stream with other options.
        """
        own, theirs = asdict(self._options), {"share_prefixes": False} | state.get("options", {})
        differ = [
            f"{name}={theirs.get(name)!r} there, {own[name]!r} here" for name in own if theirs.get(name) != own[name]
        ]
        if differ:
            raise PackingError(
                f"the state is that of another stream: {'; '.join(differ)}",
                code="bad_state",
                remedy="resume with the options that the stream was started with",
            )
        self.set_epoch(state["epoch"])
        place = dict(state["place"])
        self._next = self._place = _Place(**place | {"share": place.get("share") and Share(*place["share"])})
        self._tally = Tally.from_dict(self._place.tally)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        host = host_of_this_pass()
        share = share_of_this_process(self._rows, hosted=host is not None)
        epoch = int(self._epoch) + (host.epoch if host is not None else 0)
        options = self._options
        place, self._next = self._next, _Place()
        if place.share not in (None, share):
            raise PackingError(
                f"the state is that of worker {place.share[0]} of {place.share[1]}, and this is worker {share.worker} of "
                f"{share.workers}",
                code="bad_state",
                remedy="resume with as many workers as there were",
            )
        tally = self._tally = Tally.from_dict(place.tally)
        if host is not None and hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(epoch)
        numbered = self._open(place, tally.rows_in, share)
        to_skip = place.yielded
        while True:
            documents = list(admitted_documents(numbered, tally, options.policies, wanted=options.buffer_size))
            if not documents:
                break
            folded = self._folded(documents)
            lengths = np.array([len(document.ids) for document in documents])
            if folded is not None:
                tally.fold(folded.report)
            units = lengths if folded is None else folded.tokens
            plan = plan_packs(units, options.max_length, seed=self._seed(epoch, place.buffer))
            source = self._source_state()
            for done, pack in enumerate(plan, 1):
                packed = join([documents[i] for i in pack]) if folded is None else folded.row(pack)
                tally.add(packed, lengths[pack] if folded is None else folded.documents(pack))
                if done < len(plan):
                    place = replace(place, yielded=done, share=share)
                else:
                    place = _Place(buffer=place.buffer + 1, source=source, tally=tally.to_dict(), share=share)
                self._place = place
                if done > to_skip:
                    yield packed
            to_skip = 0
        # A worker's share of a stream may be empty; all of it may not.
        if not tally.rows and share.workers == 1:
            lost = "".join(f", {kind} {loss.rows:,}" for kind, loss in tally.lost.items())
            raise PackingError(f"no document to pack: {tally.rows_in:,} rows{lost}", code="empty_dataset")

    def _folded(self, documents: list[Document]) -> FoldedBuffer | None:
        """The buffer as trees, where beginnings are shared."""
        if not self._options.share_prefixes:
            return None
        for document in documents:
            try:
                check_sharing(True, list(document.others))
            except PackingError as error:
                raise error.at_row(document.row) from error
        ids, labels = ([getattr(document, name) for document in documents] for name in ("ids", "labels"))
        return FoldedBuffer(ids, labels, self._options.max_length)

    def _seed(self, epoch: int, buffer: int) -> list[int] | None:
        return None if self._options.seed is None else [self._options.seed, epoch, buffer]

    def _source_state(self) -> Any:
        return self._rows.state_dict() if self._options.fast_forward == "state" else None  # type: ignore[attr-defined]

    def _open(self, place: _Place, consumed: int, share: Share) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """This share of the source from its row `consumed` on, numbered."""
        if get_worker_info() is not None:
            self._worker_passes.add_(1)
        if self._options.fast_forward == "state" and (place.buffer or self._opened):
            self._rows.load_state_dict(place.source if place.buffer else self._first_state)  # type: ignore[attr-defined]
        if isinstance(self._rows, Iterator) and self._opened:
            raise PackingError(
                "the rows are an iterator that an earlier pass has consumed",
                code="consumed",
                remedy="pass something that can be iterated over again: a list, a dataset, an object with __iter__",
            )
        self._opened = True
        numbered = numbered_rows(self._rows, share)
        if self._options.fast_forward == "replay":
            skipped = sum(1 for _ in itertools.islice(numbered, consumed))
            if skipped < consumed:
                raise PackingError(
                    f"the state lies behind {consumed:,} rows and there are {skipped:,}",
                    code="bad_state",
                    remedy="resume on the rows that the stream was started with",
                )
            return numbered
        return ((number + consumed, row) for number, row in numbered)
