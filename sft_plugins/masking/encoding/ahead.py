"""Rows planned while the tokenizer has the texts of those before them.

    this thread   plan 1 │ plan 2    │ make 1, plan 3 │ make 2, plan 4 │ …        from row to texts, from ids to row
    the other            │ encode 1  │ encode 2       │ encode 3       │          from texts to ids, and nothing else

A tokenizer in Rust lets go of Python's lock, so both go on at once where a second processor is free. What is made, and in
which order, is the same as one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Plans = TypeVar("Plans")
Ids = TypeVar("Ids")


def encoded_ahead(planned: Iterable[Plans], encode: Callable[[Plans], Ids]) -> Iterator[tuple[Plans, Ids]]:
    """Each of `planned` with what `encode` makes of it, in order; the next is asked for while the last is encoded.

    What `encode` raises is raised here. Its thread ends with the iterator, so that none is alive where a process forks
    between two calls.
    """
    waiting: tuple[Plans, Future[Ids]] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as thread:
        for plans in planned:
            begun = plans, thread.submit(encode, plans)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = begun
        if waiting is not None:
            yield waiting[0], waiting[1].result()
