"""One rank of `configs/trl_packing.py` as `accelerate launch` starts it; writes down how its model was wrapped.

    accelerate launch --config_file configs/accelerate_ddp.yaml worker_script.py FOLDER [--shard] configs/trl_packing.py …

With `--shard`, accelerate is told that its CPU processes are GPU processes: the one thing that keeps it from taking its own way
through FSDP2 there.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch


def shard_on_the_cpu() -> None:
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    own = PartialState.__init__

    def as_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_on_gpus


def main() -> None:
    folder, *arguments = sys.argv[1:]
    if arguments[0] == "--shard":
        shard_on_the_cpu()
        del arguments[0]
    sys.argv = arguments
    torch.manual_seed(0)  # TRL 1.9 draws the adapter's weights before it seeds
    trainer = runpy.run_path(arguments[0], run_name="__main__")["trainer"]
    found = {
        "world": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "sharded": sum(type(p).__name__ == "DTensor" for p in trainer.model.parameters()),
        "parameters": len(list(trainer.model.parameters())),
        "logged": [[record["loss"], record["grad_norm"]] for record in trainer.state.log_history if "loss" in record],
    }
    (Path(folder) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
