"""What each process of a test with several ranks does last."""

from __future__ import annotations

import os
import sys


def leave_process_group() -> None:
    """Ends this process, with success and at once.

    Left to the interpreter's exit, a thread of gloo's may still run while its owner is taken down, and C++ aborts a rank
    whose work is done ("terminate called without an active exception": one launch in about ten). Ending the process group
    first makes that rarer only, since a wrapped model in a cycle of references keeps its group; and where a run was made to
    fail, ranks have called for different things, so that they could wait for each other here for ever.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
