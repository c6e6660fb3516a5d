"""What is relied upon of torch's private modules: fails on a torch in which they have changed."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastvit_train.utils import torch_private


def test_collectives_of_a_fake_group_return_at_once_and_the_group_is_closed() -> None:
    with torch_private.fake_process_group(1024):
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1024)
        tensor = torch.ones(4)
        dist.all_reduce(tensor)
        dist.broadcast(tensor, src=0)
        with pytest.raises(ValueError), torch_private.fake_process_group(2):
            pass
        assert dist.get_world_size() == 1024
    assert not dist.is_initialized()


def test_a_dispatch_mode_sees_operators_and_their_collectives() -> None:
    class Recorder(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append((func.namespace, func.name()))
            return func(*args, **(kwargs or {}))

    names: list[tuple[str, str]] = []
    with torch_private.fake_process_group(4), Recorder():
        torch.ones(4, requires_grad=True).exp().sum().backward()  # the backward pass runs in C++
        dist.all_reduce(torch.ones(4))
    assert {("aten", "aten::exp"), ("aten", "aten::mul.Tensor"), ("c10d", "c10d::allreduce_")} <= set(names)


@pytest.fixture
def _compiler_left_as_it_was():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiler_left_as_it_was")
def test_graphs_and_graph_breaks_are_counted() -> None:
    def function(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    graphs, breaks = torch_private.count_compiled_graphs(), torch_private.count_graph_breaks()
    compiled = torch.compile(function, backend="eager")
    for _ in range(2):
        compiled(torch.ones(3))
    assert torch_private.count_compiled_graphs() == graphs + 2  # before and after the break
    assert torch_private.count_graph_breaks() == breaks + 1


@pytest.mark.usefixtures("_compiler_left_as_it_was")
def test_the_recompile_limit_holds_within_the_context_only() -> None:
    def compile_for_sizes(sizes: int) -> int:
        torch._dynamo.reset()
        before = torch_private.count_compiled_graphs()
        compiled = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
        for size in range(2, 2 + sizes):
            compiled(torch.ones(size))
        return torch_private.count_compiled_graphs() - before

    with torch_private.recompile_limit(3):
        assert compile_for_sizes(6) == 3
    assert compile_for_sizes(6) == 6


def test_the_scale_of_a_scaler_changes_in_place() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight])
    scaler.scale(weight * torch.inf).backward()
    scale = torch_private.current_scale(scaler)
    assert scale == scaler.get_scale() == 8
    scaler.step(optimizer)
    scaler.update()
    assert scale == scaler.get_scale() == 4
