"""What pytest must know before it loads the conftest.py of a folder: bench/'s options, how many processes run tests."""

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("benchmark").addoption(
        "--benchmark-rows",
        choices=("main", "all"),
        default="main",
        help="which benchmarks to time: main (the default), the comparison that bench/README.md opens with, or all. "
        "Benchmarks that are given by their node id are always timed.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Time benchmarks only with --benchmark-only or --benchmark-enable; with the former, collect nothing but bench/."""
    if not config.getoption("benchmark_only"):
        config.option.benchmark_disable = not config.getoption("benchmark_enable")
    elif config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args = [str(Path(__file__).parent / "bench")]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per CPU core runs the whole suite; one alone runs what is named, times benchmarks, or has a GPU."""
    import torch  # not for `pytest --help`

    times_benchmarks = config.getoption("benchmark_only") or config.getoption("benchmark_enable")
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS or times_benchmarks or torch.cuda.is_available():
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
