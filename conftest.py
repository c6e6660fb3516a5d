"""The pytest options of bench/, which pytest must know before it loads bench/conftest.py."""

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
