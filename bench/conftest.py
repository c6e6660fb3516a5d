"""How benchmarks run: `pytest --benchmark-only` times them alone; plain `pytest` runs and checks each once."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.case import CHECK_BATCH, Case, many_compiled_at_once, prepare_process
from bench.measure import Row

ROUNDS_IN_TURN = 5


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmark_only"):
        config.option.benchmark_disable = not config.getoption("benchmark_enable")
    elif config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args = [str(Path(__file__).parent)]
    prepare_process()


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(case, Case) and case.slow_check and config.option.benchmark_disable:
            item.add_marker("slow")


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Callable[[Case], None]:
    """Check a case and time it; where benchmarks are disabled, check it with a few images."""

    def time_row(case: Case) -> None:
        if case.unavailable:
            pytest.skip(case.unavailable)
        with many_compiled_at_once():
            row = Row(case, CHECK_BATCH if benchmark.disabled else None)
            try:
                if benchmark.disabled:
                    benchmark(row.block)
                else:
                    _time(benchmark, row)
            finally:
                row.work.close()

    return time_row


def _time(benchmark: BenchmarkFixture, row: Row) -> None:
    calls = f", {row.work.calls} calls a round" if row.work.calls > 1 else ""
    benchmark.group, benchmark.name = row.case.group + calls, row.case.name
    row.warm_up()
    alternate = row.work.alternate
    if alternate is None:
        usage = row.metered(lambda: benchmark(row.block))
    else:
        options = {"setup": lambda: alternate() and None, "rounds": ROUNDS_IN_TURN, "iterations": 1}
        benchmark.pedantic(row.block, **options)
        usage = row.metered(row.block)
    assert benchmark.stats is not None
    benchmark.extra_info.update(row.facts(benchmark.stats.stats.median, usage))
