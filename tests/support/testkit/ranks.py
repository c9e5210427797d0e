"""What each process of a test with several ranks does last."""

from __future__ import annotations

from torch.distributed import distributed_c10d


def leave_process_group() -> None:
    """Ends this rank's process group, where there is one.

    Left to the interpreter's exit, a thread of gloo's may still run while its owner is taken down, and C++ aborts a rank
    whose work is done ("terminate called without an active exception": one launch in about ten).
    """
    if distributed_c10d.is_initialized():
        distributed_c10d.destroy_process_group()
