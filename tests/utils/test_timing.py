"""Interleaved rounds, quartiles, and waiting for the device."""

import time
from collections.abc import Callable

import pytest
import torch

from fastvit_train.utils import timing
from fastvit_train.utils.timing import quartiles, time_call, time_in_rounds


def test_quartiles_by_hand() -> None:
    assert quartiles([7.0]) == (7, 7, 7)
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (2, 3, 4)
    low, median, high = quartiles([1.0, 9.0, 2.0])
    assert 1 <= low <= median <= high <= 9


def test_rounds_are_interleaved_and_the_slower_call_is_measured_as_slower() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> Callable[[], object]:
        return lambda: order.append(name) or time.sleep(seconds)

    times = time_in_rounds([call("slow", 0.004), call("fast", 0.002)], rounds=9, device=torch.device("cpu"))
    slow, fast = (quartiles(values) for values in times)
    assert slow.low > fast.high and slow.median / fast.median == pytest.approx(2, rel=0.3)
    assert order == ["slow", "fast"] * 9 and [len(values) for values in times] == [9, 9]


def test_the_clock_stops_after_all_calls_and_after_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    clock = iter((1.0, 4.0))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: events.append("clock") or next(clock))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append(f"wait for {device}"))
    assert time_call(lambda: events.append("call"), torch.device("cuda", 1), calls=2) == 3
    assert events == ["clock", "call", "call", "wait for cuda:1", "clock"]


def test_a_cpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: pytest.fail("nothing to wait for"))
    timing.synchronize(torch.device("cpu"))
