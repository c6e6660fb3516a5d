"""Actions that all ranks take together, with their errors and results shared."""

import socket
from collections.abc import Callable
from typing import TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import nn

from fastvit_train.utils.errors import UserError
from fastvit_train.utils.gpu_monitor import Meter, Usage, merge_usages

Result = TypeVar("Result")


def run_on_all_ranks(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Run `action` on all ranks and wait for all of them; a UserError on one of them is raised on all.

    Without this, the other ranks would wait forever for the one that failed.
    """
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = error
    first = first_of_ranks(failure)
    if first is not None:
        first.on_all_ranks = True
        raise first
    return cast(Result, result)


def first_of_ranks(value: Result | None) -> Result | None:
    """Return on all ranks the first `value` of a rank that is not None."""
    return next((value for value in gather_object([value]) if value is not None), None)


def broadcast_from_rank0(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and return its result on all ranks; a UserError there is raised on all ranks."""
    own = run_on_all_ranks(accelerator, lambda: action() if accelerator.is_main_process else None)
    return cast(Result, broadcast_object_list([own])[0])


def share_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers that `model` has on rank 0, such as the running statistics of batch norm."""
    for buffer in model.buffers():
        broadcast(buffer)


def sum_usage_over_ranks(accelerator: Accelerator, meter: Meter, usage: Usage) -> Usage:
    """Return `usage` with the energy of the GPUs of all ranks, each GPU counted once, and their mean utilisation."""
    if accelerator.num_processes == 1 or accelerator.device.type != "cuda":
        return usage
    own = ((socket.gethostname(), meter.gpu or accelerator.process_index), usage)
    usages = list(dict(gather_object([own])).values())
    return merge_usages(usage.seconds, usages)
