"""Rows planned while the tokenizer has the texts of those before them.

    this thread   plan 1 │ plan 2    │ make 1, plan 3 │ make 2, plan 4 │ …
    the other            │ encode 1  │ encode 2       │ encode 3       │

A tokenizer in Rust lets go of Python's lock, so both go on at once where a second processor is free. What is made, and in
which order, is the same as one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ROWS = 32  # planned at a time: enough for the tokenizer to be called seldom, few enough for the first to be waited for

Example = TypeVar("Example")
Plans = TypeVar("Plans")
Ids = TypeVar("Ids")


def in_turn(
    examples: list[Example], plan: Callable[[list[Example]], Plans], encode: Callable[[Plans], Ids], *, ahead: bool
) -> Iterator[tuple[Plans, Ids]]:
    """Plans of some of `examples`, with what `encode` makes of them, in order.

    `ahead`: more than `ROWS` examples are planned while those before them are encoded, in a thread that ends with the
    iterator, so that none is alive where a process forks between two calls. What it raises is raised here.
    """
    if not ahead or len(examples) <= ROWS:
        plans = plan(examples)
        yield plans, encode(plans)
        return
    waiting: list[tuple[Plans, Future[Ids]]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as thread:
        for start in range(0, len(examples), ROWS):
            plans = plan(examples[start : start + ROWS])
            waiting.append((plans, thread.submit(encode, plans)))
            if len(waiting) > 1:
                plans, ids = waiting.pop(0)
                yield plans, ids.result()
        for plans, ids in waiting:
            yield plans, ids.result()
