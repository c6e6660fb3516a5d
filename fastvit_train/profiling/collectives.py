"""Count in one process what each of many ranks holds in memory and exchanges in a training step.

The process is rank 0 of torch's fake process group, which can have any size. The group's collectives move nothing, so
the values that they return are useless, but each is called as in real training, with tensors of the same sizes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastvit_train.distributed import env, parallelize
from fastvit_train.profiling.short_run import eager_copy
from fastvit_train.profiling.speedups import autocast_dtype
from fastvit_train.training.optim.optimizer import build_optimizer
from fastvit_train.training.session import TrainSession
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.torch_private import TorchDispatchMode, fake_process_group

NAMESPACES = ("c10d", "_c10d_functional")
"""namespaces of torch's operators that communicate"""
KINDS = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
}
"""the collective of each operator in these namespaces"""
NOT_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd")
"""operators in these namespaces that send nothing"""
RING_PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "broadcast": 1}
"""times that a tensor travels around the ring: an all-reduce is a reduce-scatter followed by an all-gather"""
WARM_UP_STEPS = 3
"""by then DDP has rebuilt its gradient buckets, and the optimizer has its state"""
BATCH_SIZE = 2
"""The collectives do not depend on it, but batch norm needs more than one image."""
BLOCK_CLASS = "Block"
"""the class whose instances FSDP2 shards one by one, in our models and in most of timm's"""


@dataclass(frozen=True)
class Collective:
    """A collective operation on a tensor; `size` is the bytes of the whole tensor, not of one rank's shard.

    The traffic is that of the ring algorithms (Patarasuk & Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002;
    NCCL's, https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): the tensor is split into n parts for n
    ranks, and in each of n - 1 hops every rank sends one part to its neighbour.
    """

    kind: str
    size: int

    def sent(self, world_size: int) -> float:
        """Bytes that each rank sends: 2 (n - 1) / n of the tensor for an all-reduce, (n - 1) / n for the others."""
        return RING_PASSES[self.kind] * (world_size - 1) / world_size * self.size

    def hops(self, world_size: int) -> int:
        """Number of messages that follow one another: 2 (n - 1) for an all-reduce, n - 1 for the others."""
        return RING_PASSES[self.kind] * (world_size - 1)


@dataclass(frozen=True)
class RankCost:
    """Bytes that one rank holds at the end of a backward pass, and the collectives that it calls in a step."""

    weights: int
    """parameters and buffers"""
    gradients: int
    optimizer: int
    """the optimizer's state"""
    gathered: int
    """unsharded parameters that FSDP2 holds at the same time: the root's, those of the block that is computed, and
    those of the next block, which are prefetched"""
    collectives: tuple[Collective, ...]


class CollectiveCounter(TorchDispatchMode):
    """Records the collectives that are called within this context, from Python or from C++.

    Raises:
        RuntimeError: if an operator communicates but is missing from `KINDS`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor then calls the collectives itself, and they are recorded
        result = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES:
            name = func.name().partition("::")[2].partition(".")[0]
            if name in KINDS:
                self.collectives.append(Collective(KINDS[name], max(map(_tensor_bytes, (*args, result)))))
            elif name not in NOT_COLLECTIVES:
                raise RuntimeError(f"the traffic of the operator {func} is unknown; add it to KINDS")
        return result


ModelWrapper = Callable[[nn.Module], nn.Module]


def single_process_cost(session: TrainSession) -> RankCost:
    """Count the cost of training in one process."""
    return _count_cost(session, lambda model: model)


def ddp_cost(session: TrainSession, world_size: int) -> RankCost:
    """Count the cost of one of 2 or more ranks under DDP: each has a whole copy of the model.

    Raises:
        UserError: if this process belongs to a process group.
    """
    check_no_process_group()
    with fake_process_group(world_size):
        return _count_cost(session, lambda model: _wrap_in_ddp(session, model))


def fsdp2_cost(session: TrainSession, world_size: int) -> RankCost:
    """Count the cost of rank 0 of 2 or more ranks under FSDP2: each has a shard of every parameter, rank 0 the largest.

    Raises:
        UserError: if the run's model or optimizer can't be sharded, or if this process belongs to a process group.
    """
    check_no_process_group()
    with fake_process_group(world_size):
        return _count_cost(session, lambda model: _shard_with_fsdp2(session, model, world_size))


def check_no_process_group() -> None:
    """Raise UserError if this process belongs to a process group, or was launched to join one."""
    if dist.is_initialized() or env.under_torchelastic() or env.launched_world_size() > 1:
        raise UserError(
            "plan runs in one process and only simulates the other ranks; start it without a launcher: "
            "python -m fastvit_train plan"
        )


def _wrap_in_ddp(session: TrainSession, model: nn.Module) -> nn.Module:
    """Wrap the model in DDP under the run's settings.

    The fake group can't return the future that DDP's own all-reduce waits for, so a hook calls all-reduce instead.
    """

    def all_reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        dist.all_reduce(bucket.buffer())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    ddp = parallelize.wrap_in_ddp(model, session.config.optim.grad_accum)
    ddp.register_comm_hook(None, all_reduce)
    return ddp


def _shard_with_fsdp2(session: TrainSession, model: nn.Module, world_size: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (world_size,))
    dtype = autocast_dtype(session.accelerator.mixed_precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in (*blocks_of(model), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """List the modules whose parameters FSDP2 gathers and frees together; the root has those that remain."""
    return [module for module in model.modules() if type(module).__name__ == BLOCK_CLASS]


def _count_cost(session: TrainSession, wrap: ModelWrapper) -> RankCost:
    """Train a copy of the run's model on the CPU for a few steps, and count what the last step holds and sends."""
    model, config = eager_copy(session).cpu(), session.config.optim
    block_count = len(blocks_of(model))
    wrapped = wrap(model)
    optimizer = build_optimizer(model, config)
    images, labels = torch.zeros(BATCH_SIZE, *session.config.input_size), torch.zeros(BATCH_SIZE, dtype=torch.long)

    def backward() -> None:
        for remaining in reversed(range(config.grad_accum)):
            with _gradient_sync(wrapped, enabled=remaining == 0):
                F.cross_entropy(wrapped(images).float(), labels).backward()

    def update() -> None:
        if config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()

    with _single_thread():
        for _ in range(WARM_UP_STEPS):
            backward()
            update()
            optimizer.zero_grad()
        with CollectiveCounter() as counter:
            backward()
            gradients = _local_bytes(p.grad for p in model.parameters())
            update()
    states = optimizer.state.values()
    return RankCost(
        weights=_local_bytes((*model.parameters(), *model.buffers())),
        gradients=gradients,
        optimizer=_local_bytes(value for state in states for value in state.values()),
        gathered=_gathered_bytes(counter.collectives, block_count) if isinstance(wrapped, FSDPModule) else 0,
        collectives=tuple(counter.collectives),
    )


@contextmanager
def _single_thread() -> Iterator[None]:
    """Compute with one thread: for a step of two images, starting more threads takes longer than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _gradient_sync(wrapped: nn.Module, enabled: bool) -> AbstractContextManager[object]:
    """Synchronise gradients in the last micro-batch only, as accelerate does."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(enabled)
    if isinstance(wrapped, DistributedDataParallel) and not enabled:
        return wrapped.no_sync()
    return nullcontext()


def _gathered_bytes(collectives: list[Collective], block_count: int) -> int:
    """Bytes of the root's parameters, which are gathered first, and of the parameters of the two largest blocks."""
    sizes = [collective.size for collective in collectives if collective.kind == "all-gather"]
    root, *blocks = sizes[: 1 + block_count]
    return root + sum(sorted(blocks)[-2:])


def _local_bytes(values: Iterable[Any]) -> int:
    """Bytes that the tensors among `values` take on this rank."""
    local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    return sum(value.nbytes for value in local if isinstance(value, Tensor))


def _tensor_bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists and tuples; 0 for other values."""
    if isinstance(value, list | tuple):
        return sum(map(_tensor_bytes, value))
    return value.nbytes if isinstance(value, Tensor) else 0
