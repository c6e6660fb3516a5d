"""`pytest --benchmark-only` times the benchmarks; plain `pytest` only checks some of them, with a few images.

Imports are in functions, since the process that hands out the tests needs none and would start the others later.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

if TYPE_CHECKING:
    from bench.benchmark_case import BenchmarkCase
    from bench.measure import PreparedCase


@pytest.hookimpl(tryfirst=True)  # before -m is evaluated
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from bench.benchmark_case import BenchmarkCase, device
    from fastvit_train.distributed.accelerator import cpu_lacks_bf16

    cases = {item: item.callspec.params.get("case") for item in items if hasattr(item, "callspec")}
    benchmarks = {item: case for item, case in cases.items() if isinstance(case, BenchmarkCase)}
    if config.option.benchmark_disable:
        takes_long = "bf16" if device().type == "cpu" and cpu_lacks_bf16() else None
        for item, case in benchmarks.items():
            if not case.quick_check or case.dtype == takes_long:
                item.add_marker("slow")
    elif config.getoption("benchmark_rows") == "main" and not any("::" in argument for argument in config.args):
        others = [item for item, case in benchmarks.items() if not case.main]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_collection_finish() -> None:
    from bench.benchmark_case import prepare_process

    prepare_process()


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Callable[["BenchmarkCase"], None]:
    """Check a case and time it; if benchmarks are disabled, only check it, with a few images."""
    from bench.benchmark_case import CHECK_BATCH
    from bench.measure import PreparedCase
    from fastvit_kernels.torch_private import specialize_each_shape

    def check_and_time(case: "BenchmarkCase") -> None:
        if case.why_unavailable:
            pytest.skip(case.why_unavailable)
        with specialize_each_shape():
            prepared = PreparedCase(case, CHECK_BATCH if benchmark.disabled else None)
            try:
                if benchmark.disabled:
                    benchmark(prepared.block)
                else:
                    _time(benchmark, prepared)
            finally:
                prepared.workload.close()

    return check_and_time


def _time(benchmark: BenchmarkFixture, prepared: "PreparedCase") -> None:
    workload = prepared.workload
    calls = f", {workload.calls} calls per round" if workload.calls > 1 else ""
    benchmark.group, benchmark.name = prepared.case.group + calls, prepared.case.name
    if workload.rounds is None:
        prepared.warm_up()
        usage = prepared.meter_usage(lambda: benchmark(prepared.block))
    else:
        usage = prepared.meter_usage(
            lambda: benchmark.pedantic(prepared.block, rounds=workload.rounds, iterations=1, warmup_rounds=0)
        )
    assert benchmark.stats is not None
    benchmark.extra_info.update(prepared.describe(benchmark.stats.stats.median, usage))
