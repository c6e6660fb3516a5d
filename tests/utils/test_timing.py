"""Interleaved rounds, quartiles, and waiting for the device."""

from collections.abc import Callable

import pytest
import torch

from fastvit_train.utils import timing
from fastvit_train.utils.timing import SlowdownDetector, quartiles, time_call, time_in_rounds


def test_quartiles_by_hand() -> None:
    assert quartiles([7.0]) == (7, 7, 7)
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (2, 3, 4)
    low, median, high = quartiles([1.0, 9.0, 2.0])
    assert 1 <= low <= median <= high <= 9


def test_rounds_are_interleaved_and_each_call_gets_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)

    def call(name: str, seconds: float) -> Callable[[], object]:
        def run() -> None:
            nonlocal now
            order.append(name)
            now += seconds

        return run

    times = time_in_rounds([call("slow", 4.0), call("fast", 2.0)], rounds=9, device=torch.device("cpu"))
    assert times == [[4.0] * 9, [2.0] * 9] and order == ["slow", "fast"] * 9


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


def test_a_slowdown_is_detected_once_and_against_the_fastest_epoch() -> None:
    detector = SlowdownDetector()
    assert [detector.factor(seconds, 10) for seconds in (30.0, 10.0, 29.0)] == [None] * 3, "the first is the slowest"
    assert detector.factor(1.0, 1) is None, "too short"
    assert detector.factor(35.0, 10) == pytest.approx(3.5)
    assert detector.factor(90.0, 10) is None, "it is reported once"
