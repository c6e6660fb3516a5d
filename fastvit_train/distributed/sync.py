"""What the ranks do together: act, agree, and add up."""

import socket
from collections.abc import Callable
from typing import TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from fastvit_train.utils.errors import UserError
from fastvit_train.utils.gpu_monitor import Meter, Usage, merge_usages

Result = TypeVar("Result")


def run_on_all_ranks(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Do `action` on every process and wait for all; a UserError on any of them is raised on all of them.

    Without this, the others would wait in vain for the one that failed.
    """
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = error
    first = next((error for error in gather_object([failure]) if error is not None), None)
    if first is not None:
        first.on_all_ranks = True
        raise first
    return cast(Result, result)


def broadcast_from_rank0(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """What `action` returns on the first process, on all of them; a UserError there is raised on all."""
    own = run_on_all_ranks(accelerator, lambda: action() if accelerator.is_main_process else None)
    return cast(Result, broadcast_object_list([own])[0])


def sum_usage_over_ranks(accelerator: Accelerator, meter: Meter, usage: Usage) -> Usage:
    """This process's `usage` with the energy of all processes' GPUs, each counted once, and their mean utilisation."""
    if accelerator.num_processes == 1 or accelerator.device.type != "cuda":
        return usage
    own = ((socket.gethostname(), meter.gpu or accelerator.process_index), usage)
    usages = list(dict(gather_object([own])).values())
    return merge_usages(usage.seconds, usages)
