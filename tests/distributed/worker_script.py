"""One rank of `configs/trl_packing.py` as `accelerate launch` starts it; writes down how its model was wrapped.

    accelerate launch --config_file configs/accelerate_ddp.yaml worker_script.py FOLDER [--shard] configs/trl_packing.py …

With `--shard`, accelerate is told that its CPU processes are GPU processes, or DeepSpeed's: the one thing that keeps it from
taking its own way through FSDP2 or DeepSpeed there. DeepSpeed partitions parameters however small they are; by default those
below 100,000 elements stay whole.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from testkit.ranks import leave_process_group


def shard_on_the_cpu() -> None:
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    own, with_deepspeed = PartialState.__init__, os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if with_deepspeed:
        del os.environ["ACCELERATE_USE_CPU"]
        partition_small_parameters()

    def as_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
        # Without `cpu` a process that finds no accelerator takes itself for the only one.
        own(self, **(kwargs | {"cpu": True})) if with_deepspeed else own(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and with_deepspeed:
            from deepspeed import comm

            comm.init_distributed("gloo", auto_mpi_discovery=False)
            self.distributed_type = DistributedType.DEEPSPEED
        elif self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_on_gpus


def partition_small_parameters() -> None:
    import deepspeed

    own = deepspeed.initialize

    def initialize(*args: Any, config_params: dict[str, Any], **kwargs: Any) -> Any:
        zero = {**config_params["zero_optimization"], "stage3_param_persistence_threshold": 0}
        return own(*args, config_params={**config_params, "zero_optimization": zero}, **kwargs)

    deepspeed.initialize = initialize


def is_sharded(parameter: Any) -> bool:
    """By FSDP2, or by DeepSpeed."""
    status = getattr(parameter, "ds_status", None)
    return type(parameter).__name__ == "DTensor" or (status is not None and status.name == "NOT_AVAILABLE")


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
        "stage": getattr(trainer.model_wrapped, "zero_optimization_stage", lambda: None)(),
        "sharded": sum(map(is_sharded, trainer.model.parameters())),
        "parameters": len(list(trainer.model.parameters())),
        "logged": [[record["loss"], record["grad_norm"]] for record in trainer.state.log_history if "loss" in record],
    }
    (Path(folder) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave_process_group()
