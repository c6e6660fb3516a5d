"""`compiled` compiles once per shape, not per step."""

from pathlib import Path

import pytest
import torch

import fastvit_kernels
from fastvit_kernels import torch_private
from fastvit_train.utils.torch_private import count_compiled_graphs, recompile_limit
from tests.kernels.accuracy import assert_accurate
from tests.kernels.attention_cases import cast, chain, draw
from tests.support import write_program


@pytest.mark.slow
def test_no_recompilation_from_step_to_step(seed: int) -> None:
    torch_private.reset_compiler()

    def step(batch: int) -> None:
        x, weight, bias = draw((batch, 5, 16, 2), True, torch.float32)
        fastvit_kernels.attention(x, weight, bias, 2, implementation="compiled").sum().backward()

    graphs = []
    for batch in (3, 3, 3, 4, 3, 4):
        step(batch)
        graphs.append(count_compiled_graphs())
    first = graphs[0]
    assert graphs == [first, first, first, first + 1, first + 1, first + 1]


@pytest.mark.slow
def test_more_shapes_than_dynamo_recompiles_one_function_for(seed: int) -> None:
    with recompile_limit(2), torch.no_grad():
        for batch in range(1, 5):
            x, weight, bias = draw((batch, 2, 8, 2), False, torch.float32)
            fastvit_kernels.attention(x, weight, bias, 2, implementation="compiled")


@pytest.mark.slow
def test_inside_a_larger_compiled_graph(seed: int) -> None:
    arguments = draw((3, 5, 16, 2), True, torch.float32)

    def function(*arguments: torch.Tensor) -> torch.Tensor:
        return fastvit_kernels.attention(*arguments, 2, implementation="compiled") + 1

    result = torch.compile(function, fullgraph=True)(*arguments)
    exact = chain(*cast(arguments, torch.float64), 2) + 1
    assert_accurate([result.detach()], [(chain(*arguments, 2) + 1).detach()], [exact.detach()])


def test_without_a_compiler_that_works_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = write_program(tmp_path / "compiler", "exit 3")
    for name, failure in ((str(compiler), "does not work ("), ("no-such-compiler", "was not found; install it, or")):
        monkeypatch.setenv("CXX", name)
        reasons = fastvit_kernels.implementations()
        for implementation in ("compiled", "cpp"):
            assert f"needs a C++ compiler, and {name} {failure}" in str(reasons[implementation])
    with pytest.raises(ValueError, match=r"'compiled' needs a C\+\+ compiler.*available here: naive, fused, sdpa"):
        fastvit_kernels.check_implementation("compiled")
