"""Fixed batches dealt to ranks, and no rank left waiting for another that has failed (C9).

Invariant: every rank makes the same number of calls and of exchanges, whatever happens inside a call. Batch b goes to
    rank b % size; a rank without a batch in the last round repeats the last one and throws the result away. After
    every call the ranks exchange an ok-flag; one failure anywhere raises `ProbeError` everywhere, at the same point.

    5 batches, 2 ranks    round 0: 0 1    round 1: 2 3    round 2: 4 (4)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["ProbeError", "Ranks", "free_memory", "is_out_of_memory"]

B = TypeVar("B")
R = TypeVar("R")


class ProbeError(RuntimeError):
    """A probe was given up, on every rank alike. `out_of_memory` says that a smaller batch may succeed."""

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        self.out_of_memory = out_of_memory
        super().__init__(message)


class Ranks:
    """The process group in use, or a group of one."""

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1

    def share(self, value: R) -> list[R]:
        """The value of every rank, on every rank. The only exchange there is."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], R]) -> R:
        """`make()` of rank 0, on every rank; its exception, too."""
        return self.together(lambda: make() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def together(self, work: Callable[[], R]) -> list[R]:
        """`work()` of every rank, on every rank; raises on all of them when it raises on one."""
        value: R | None = None
        failure: BaseException | None = None
        try:
            value = work()
        except Exception as error:
            failure = error
        told = None if failure is None else (f"{type(failure).__name__}: {failure}", is_out_of_memory(failure))
        everywhere = self.share((value, told))
        failures = [(rank, told) for rank, (_, told) in enumerate(everywhere) if told is not None]
        if failures:
            if failure is not None and self.size == 1:
                raise failure
            message = "; ".join(f"rank {rank}: {told[0]}" for rank, told in failures)
            raise ProbeError(message, out_of_memory=any(told[1] for _, told in failures)) from failure
        return [v for v, _ in everywhere]  # type: ignore[misc]

    def deal(
        self, batches: Sequence[B], work: Callable[[B], R], *, progress: Callable[[int], None] | None = None
    ) -> list[R]:
        """`[work(b) for b in batches]` on every rank, the work divided among them."""
        results: dict[int, R] = {}
        for first in range(0, len(batches), self.size):
            mine = min(first + self.rank, len(batches) - 1)
            done = self.together(lambda mine=mine: work(batches[mine]))  # type: ignore[misc]
            for rank, result in enumerate(done):
                results.setdefault(min(first + rank, len(batches) - 1), result)
            if progress is not None:
                progress(min(self.size, len(batches) - first))
        return [results[i] for i in range(len(batches))]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may succeed where this failed."""
    if isinstance(error, ProbeError):
        return error.out_of_memory
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower()


def free_memory() -> None:
    """Hand cached blocks back, so that a smaller batch finds room."""
    if torch.accelerator.is_available() and hasattr(torch.get_device_module(), "empty_cache"):
        torch.get_device_module().empty_cache()
