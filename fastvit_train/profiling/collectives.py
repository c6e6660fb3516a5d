"""What one process of many holds and exchanges in a step, counted on the first of them, the others imagined.

The group is torch's fake one, of any size: its collectives move nothing, so what they compute is of no use, but each is
called as in a training, with tensors of the same sizes.
"""

import warnings
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
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvit_train.profiling.short_run import plain_model
from fastvit_train.profiling.speedups import autocast_dtype
from fastvit_train.training.optimizer import build_optimizer
from fastvit_train.training.session import TrainSession
from fastvit_train.utils.errors import UserError

NAMESPACES = ("c10d", "_c10d_functional")
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
"""torch's operators by what they do"""
ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "broadcast": 1}
"""that a tensor goes around the ring: an all-reduce is a reduce-scatter and an all-gather"""
SILENT = ("wait_tensor", "_wrap_tensor_autograd")
SETTLED = 3
"""steps until DDP has cut its buckets anew, and the optimizer has its state"""
IMAGES = 2
"""of a counted step: what is exchanged does not depend on them, but batch norm wants more than one"""
BLOCK = "Block"
"""the class that FSDP2 cuts a model at: ours and most of timm's"""


@dataclass(frozen=True)
class Collective:
    """A collective operation on a tensor of `size` bytes: all of it, as it is before or behind the parts.

    What it sends is by the ring algorithms (Patarasuk & Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002; NCCL's,
    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): the tensor is cut into as many parts as there
    are processes, and in each of (processes - 1) hops each process sends one to its neighbour.
    """

    kind: str
    size: int

    def sent(self, processes: int) -> float:
        """Bytes that each process sends: 2 (n - 1) / n of the tensor for an all-reduce, (n - 1) / n for the others."""
        return ROUNDS[self.kind] * (processes - 1) / processes * self.size

    def hops(self, processes: int) -> int:
        """Messages that follow one another: 2 (n - 1) for an all-reduce, n - 1 for the others."""
        return ROUNDS[self.kind] * (processes - 1)


@dataclass(frozen=True)
class Share:
    """What one process holds at the end of a backward pass, and exchanges in a step; bytes."""

    weights: int
    """with the buffers"""
    gradients: int
    optimizer: int
    """the optimizer's state"""
    gathered: int
    """whole parameters that FSDP2 puts together for a while: the root's, and two blocks', one used, the next fetched"""
    collectives: tuple[Collective, ...]


class CollectiveCounter(TorchDispatchMode):
    """Notes the collectives that are called within it, from Python or C++.

    Raises:
        RuntimeError: for one that `KINDS` doesn't know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls its collectives itself, and then they are seen here
        result = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES:
            name = func._opname
            if name in KINDS:
                self.seen.append(Collective(KINDS[name], max(map(_bytes, (*args, result)))))
            elif name not in SILENT:
                raise RuntimeError(f"what {func} sends is not known; add it to KINDS")
        return result


Wrap = Callable[[nn.Module], nn.Module]


def alone(session: TrainSession) -> Share:
    """Of the only process."""
    return _count(session, lambda model: model)


def ddp(session: TrainSession, processes: int) -> Share:
    """Of one that holds a whole copy, under the run's settings of DDP, among 2 or more.

    Raises:
        UserError: where this process has a real group.
    """
    with fake_group(processes):
        return _count(session, lambda model: _ddp(session, model))


def fsdp2(session: TrainSession, processes: int) -> Share:
    """Of one that holds a part of each parameter, among 2 or more: the first, whose parts are the largest.

    Raises:
        UserError: where the run can't be trained in parts, or this process has a real group.
    """
    with fake_group(processes):
        return _count(session, lambda model: _fsdp2(session, model, processes))


@contextmanager
def fake_group(processes: int) -> Iterator[None]:
    """Be the first of `processes` that aren't there; UserError where there is a real group."""
    check_no_process_group()
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_no_process_group() -> None:
    """Raise UserError where this process belongs to a real group."""
    if dist.is_initialized():
        raise UserError("plan imagines the other processes; start it as one: python -m fastvit_train plan")


def _ddp(session: TrainSession, model: nn.Module) -> nn.Module:
    """The fake group has no future to answer DDP's own all-reduce with, so a hook calls the same one."""

    def all_reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        dist.all_reduce(bucket.buffer())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that newer versions of torch give to settings
        wrapped = DistributedDataParallel(model, **session.accelerator.ddp_handler.to_kwargs())
    wrapped.register_comm_hook(None, all_reduce)
    return wrapped


def _fsdp2(session: TrainSession, model: nn.Module, processes: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (processes,))
    dtype = autocast_dtype(session.accelerator.mixed_precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in (*blocks_of(model), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What FSDP2 gathers and shards one at a time."""
    return [module for module in model.modules() if type(module).__name__ == BLOCK]


def _count(session: TrainSession, wrap: Wrap) -> Share:
    """Train a copy of the run's model for some steps on the CPU, and count the last."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a step of two images only waits for more
    try:
        return _counted(session, wrap)
    finally:
        torch.set_num_threads(threads)


def _counted(session: TrainSession, wrap: Wrap) -> Share:
    model, config = plain_model(session).cpu(), session.config.optim
    blocks = len(blocks_of(model))
    wrapped = wrap(model)
    optimizer = build_optimizer(model, config)
    size = session.config.image_size
    images, labels = torch.zeros(IMAGES, 3, size, size), torch.zeros(IMAGES, dtype=torch.long)

    def backward() -> None:
        for left in reversed(range(config.grad_accum)):
            with _exchanging(wrapped, left == 0):
                F.cross_entropy(wrapped(images).float(), labels).backward()

    def update() -> None:
        if config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()

    for _ in range(SETTLED):
        backward()
        update()
        optimizer.zero_grad()
    with CollectiveCounter() as watch:
        backward()
        gradients = _held(p.grad for p in model.parameters())
        update()
    return Share(
        weights=_held((*model.parameters(), *model.buffers())),
        gradients=gradients,
        optimizer=_held(tree_leaves([*optimizer.state.values()])),
        gathered=_gathered(watch.seen, blocks) if isinstance(wrapped, FSDPModule) else 0,
        collectives=tuple(watch.seen),
    )


def _exchanging(wrapped: nn.Module, now: bool) -> AbstractContextManager[object]:
    """Leave the exchange of gradients to the last micro-batch, as accelerate does."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(now)
    if isinstance(wrapped, DistributedDataParallel) and not now:
        return wrapped.no_sync()
    return nullcontext()


def _gathered(seen: list[Collective], blocks: int) -> int:
    """The root's parameters are gathered first, then the blocks', each as the forward pass comes to it."""
    root, *others = [collective.size for collective in seen if collective.kind == "all-gather"][: 1 + blocks]
    return root + sum(sorted(others)[-2:])


def _held(values: Iterable[Any]) -> int:
    """Bytes of the tensors among `values` that lie on this process."""
    own = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    return sum(value.nbytes for value in own if isinstance(value, Tensor))


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
