"""Python's search for cyclic garbage, left out while a batch is encoded.

It goes through every object of the process again and again as tens of thousands of lists of ids come to be, and torch and
transformers alone are a million objects: a quarter of the time. Lists of ids hold no cycles, and are freed as ever.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_search_for_cycles() -> Iterator[None]:
    """Cycles that come to be meanwhile are found afterwards; nothing changes where the search was off already."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
