"""The private parts of torch that fastvit_kernels uses behave as it relies upon, in every supported version."""

import ctypes

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvit_kernels import torch_private
from fastvit_train.utils.torch_private import count_compiled_graphs, recompile_limit


def test_a_cpp_library_is_compiled_and_loaded() -> None:
    library = torch_private.load_cpp_library('extern "C" int add(int a, int b) { return a + b; }', ())
    assert isinstance(library, ctypes.CDLL) and library.add(2, 3) == 5
    with pytest.raises(Exception, match="no_such_function"):
        torch_private.load_cpp_library('extern "C" int f() { return no_such_function(); }', ())


def test_contexts_that_change_what_operators_do_are_seen() -> None:
    found = []

    def look(x: torch.Tensor) -> torch.Tensor:
        found.append(torch_private.is_observed())
        return x

    x = torch.zeros(2)
    with torch.autograd.graph.save_on_cpu():
        look(x)
    with FlopCounterMode(display=False):
        look(x)
    torch.vmap(look)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    assert found == [True] * 4
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert not torch_private.is_observed()


def count_graphs(sizes: range) -> int:
    """Number of graphs that a function compiles to when it is called with tensors of these sizes."""
    torch_private.reset_compiler()
    function = torch.compile(lambda x: x.sin() + x.shape[0], backend="eager")
    for size in sizes:
        function(torch.zeros(size))
    return count_compiled_graphs()


def test_each_shape_is_compiled_for_itself_only_within_the_context() -> None:
    with torch_private.specialize_each_shape():
        assert count_graphs(range(2, 14)) == 12
    assert count_graphs(range(2, 14)) == 2  # one for the first shape, and one for dynamic shapes


def test_recompilations_are_limited() -> None:
    with torch_private.specialize_each_shape(), recompile_limit(3):
        assert count_graphs(range(2, 14)) == 3
