"""Memory of this process over a block, out of `/proc` (Linux): the highest, above that at the block's start."""

from __future__ import annotations

import gc
import threading
from pathlib import Path


class PeakMemory:
    """Highest resident set (MiB) within the block, above that at its start, as the kernel keeps it.

    What the process had freed before, but not handed back, is used again unseen: take one figure per process.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
        self.start = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.mib = _status("VmHWM") - self.start


class AnonymousMemory:
    """Highest memory (MiB) that no file backs, sampled, above that at the start: memory-mapped rows do not count."""

    def __enter__(self) -> AnonymousMemory:
        self.start = self.highest = _status("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.highest = max(self.highest, _status("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.mib = max(self.highest, _status("RssAnon")) - self.start


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))
