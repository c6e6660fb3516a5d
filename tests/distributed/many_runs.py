"""Started by accelerate in the tests, several processes of it: trains each of the runs that its argument lists.

Its first process ends with a line of JSON: how many gradient buckets were summed in each run. On a CPU, where
accelerate takes a launch for FSDP2 as one for DDP, it makes accelerate shard nevertheless, for what is to be tested.
"""

import json
import os
import sys
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import recipe
from fastvit_train.distributed import accelerator, env, parallelize
from fastvit_train.distributed.cpu_threads import use_all_cores
from fastvit_train.training.loop import fit

buckets = [0]
prepare = parallelize.prepare


def prepare_counted(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, use_ddp: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    def count(group: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buckets[-1] += 1
        return allreduce_hook(group, bucket)

    model, optimizer = prepare(accelerator, model, optimizer, use_ddp)
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, count)
    return model, optimizer


def shard_on_a_cpu() -> None:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # what accelerate makes FSDP of
    accelerator.check_kind = lambda: None


if __name__ == "__main__":
    parallelize.prepare = prepare_counted
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.accelerator.is_available():
        shard_on_a_cpu()
    use_all_cores()
    for settings in json.loads(sys.argv[1]):
        resume = settings.pop("resume", "never")
        fit(override(recipe("quickstart"), settings, "the test"), resume=resume)
        buckets.append(0)
    if env.is_rank0():
        print(json.dumps(buckets[:-1]))
    accelerator.leave_process_group()
