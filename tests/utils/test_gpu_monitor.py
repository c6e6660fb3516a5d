"""The GPU's energy and utilisation, against a fake of nvidia-ml-py."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed import sync
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.runs.train_state import TrainState
from fastvit_train.training import setup
from fastvit_train.training.loop import fit
from fastvit_train.utils import gpu_monitor
from fastvit_train.utils.gpu_monitor import Meter, Usage, merge_usages
from tests.support import wait_until
from tests.utils.fake_nvml import Card, FakeNvml

COUNTER, POWER = "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"
CUDA = torch.device("cuda", 0)


@pytest.fixture
def cards() -> list[Card]:
    """NVML's order; CUDA's device 0 is the second of them, as with CUDA_VISIBLE_DEVICES=1,0."""
    return [Card("other", "00000000:17:00.0", watts=70), Card("ours", "00000001:ca:00.0", watts=300)]


@pytest.fixture
def nvml(cards: list[Card], monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml(cards, time.perf_counter)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    see_gpu(monkeypatch, uuid="ours")
    monkeypatch.setattr(gpu_monitor, "INTERVAL", 0.002)
    monkeypatch.setattr(gpu_monitor, "MIN_ENERGY_SECONDS", 0.0)
    return fake


def see_gpu(monkeypatch: pytest.MonkeyPatch, **properties: object) -> None:
    known = SimpleNamespace(pci_domain_id=1, pci_bus_id=0xCA, pci_device_id=0, **properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)


def measured(device: torch.device = CUDA, seconds: float = 0.05) -> Usage:
    return measured_with_span(device, seconds)[0]


def measured_with_span(device: torch.device = CUDA, seconds: float = 0.05) -> tuple[Usage, float]:
    """The usage, and the seconds between the thread's first and last sample, which a busy machine delays."""
    meter = Meter(device)
    meter.start()
    time.sleep(seconds)
    usage = meter.stop()
    return usage, meter._samples[-1].time - meter._samples[0].time if meter._samples else 0.0


def test_energy_is_the_difference_of_the_gpus_counter(nvml: FakeNvml) -> None:
    meter = Meter(CUDA)
    meter.start()
    wait_until(lambda: nvml.calls.count("nvmlDeviceGetUtilizationRates") >= 5)  # the thread's
    usage = meter.stop()
    assert usage.seconds > 0
    _, before, *_, after = nvml.counter_seconds  # the first reading shows that there is a counter
    assert usage.energy_joules == pytest.approx(300 * (after - before), abs=2e-3)
    assert usage.mean_power_watts == pytest.approx(usage.energy_joules / usage.seconds)
    assert (usage.utilization, usage.sm_clock_mhz, usage.unmeasured) == (pytest.approx(0.8), 1980, None)


def test_without_a_counter_power_is_integrated(nvml: FakeNvml, cards: list[Card]) -> None:
    cards[1].faults.add(COUNTER)
    usage, span = measured_with_span()
    assert usage.energy_joules == pytest.approx(300 * span)
    assert usage.unmeasured is None


def test_a_rising_load_is_integrated_not_averaged_at_its_ends(
    nvml: FakeNvml, cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards[1].faults.add(COUNTER)
    times: list[float] = []

    def power(card: Card) -> float:
        times.append(time.perf_counter())
        return 1e6 * (times[-1] - times[0]) ** 2

    monkeypatch.setattr(nvml, POWER, power)
    usage = measured(seconds=0.2)
    # the mean of both ends would be 1.5 times as much; a busy machine takes few samples, at irregular times
    assert usage.energy_joules == pytest.approx(1e3 * (times[-1] - times[0]) ** 3 / 3, rel=0.2)


def test_a_gpu_without_counter_and_power_has_no_energy_but_a_reason(nvml: FakeNvml, cards: list[Card]) -> None:
    cards[1].faults |= {COUNTER, POWER}
    usage = measured()
    assert usage.energy_joules is None and usage.mean_power_watts is None
    assert usage.unmeasured == f"{POWER}: Not Supported"
    assert usage.utilization == pytest.approx(0.8)


def test_a_gpu_that_is_lost_midway_is_not_measured_and_nothing_raises(nvml: FakeNvml, cards: list[Card]) -> None:
    meter = Meter(CUDA)
    meter.start()
    time.sleep(0.02)
    cards[1].faults |= {COUNTER, POWER, "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetClockInfo"}
    time.sleep(0.02)
    usage = meter.stop()
    assert usage.energy_joules is None and usage.unmeasured and COUNTER in usage.unmeasured


@pytest.mark.parametrize("counts", [[5.0, 4.0, 3.0], [5.0, 5.0, 5.0]], ids=["back", "not at all"])
def test_a_counter_that_does_not_increase_is_not_used(nvml: FakeNvml, cards: list[Card], counts: list[float]) -> None:
    cards[1].faults.add(POWER)
    nvml.seconds = iter(counts).__next__
    usage = measured()
    assert usage.energy_joules is None and usage.unmeasured


def test_short_work_has_no_figure_but_adds_up_to_the_right_one(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of 30 ms and evaluations of 8 ms, under a counter that is updated every 100 ms."""
    now = 1000.0
    monkeypatch.setattr(gpu_monitor, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(gpu_monitor, "INTERVAL", 1000)
    monkeypatch.setattr(gpu_monitor, "MIN_ENERGY_SECONDS", 1.0)
    nvml.seconds = lambda: now // 0.1 * 0.1
    state, meter = TrainState(), Meter(CUDA)
    for _ in range(50):
        readings = len(nvml.counter_seconds)
        meter.start()
        wait_until(lambda before=readings: len(nvml.counter_seconds) > before)
        now += 0.03
        state.add_usage(meter.stop())
        assert state.epoch_usage.energy_joules is None and state.epoch_usage.mean_power_watts is None
        state.close_epoch()
        now += 0.008
    step_of_counter = 300 * 0.1
    assert state.usage.seconds == pytest.approx(1.5)
    assert state.usage.energy_joules == pytest.approx(300 * 1.5, abs=step_of_counter)
    assert "needs 1 s or more, and this took 0.03 s" in str(Usage(0.03, 9.0).energy_unmeasured)


def test_utilisation_alone_may_be_missing(nvml: FakeNvml, cards: list[Card]) -> None:
    cards[1].faults.add("nvmlDeviceGetUtilizationRates")
    usage = measured()
    assert usage.utilization is None and usage.energy_joules is not None


@pytest.mark.parametrize("uuid", [{}, {"uuid": "unknown to NVML"}], ids=["none", "unknown"])
def test_without_a_uuid_the_pci_address_identifies_the_gpu(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, uuid: dict[str, str]
) -> None:
    see_gpu(monkeypatch, **uuid)
    usage = measured()
    assert usage.energy_joules == pytest.approx(300 * (nvml.counter_seconds[-1] - nvml.counter_seconds[1]), abs=2e-3)


def test_a_mig_instance_has_no_energy(nvml: FakeNvml, cards: list[Card]) -> None:
    cards[1].mig = True
    usage = measured()
    assert usage.energy_joules is None and usage.utilization is None and "MIG" in str(usage.unmeasured)


def test_a_gpu_without_mig_is_measured(nvml: FakeNvml, cards: list[Card]) -> None:
    cards[1].faults.add("nvmlDeviceGetMigMode")
    assert measured().energy_joules is not None


def test_no_driver_no_package_and_no_gpu_give_the_reason(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.init_fault = "NVML Shared Library Not Found"
    assert measured().unmeasured == "NVML: NVML Shared Library Not Found"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert measured().unmeasured == "nvidia-ml-py is not installed"
    usage = measured(torch.device("cpu"))
    assert usage.unmeasured == "the device is not an NVIDIA GPU" and usage.energy_joules is None and usage.seconds > 0


def test_the_real_package_without_a_driver_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    see_gpu(monkeypatch, uuid="ours")
    assert "NVML" in str(measured().unmeasured)


def test_the_energy_of_several_gpus_is_added_unless_one_is_missing() -> None:
    whole = merge_usages(2.0, [Usage(2.0, 100.0, 0.5, 1000.0), Usage(2.1, 50.0, 0.7, 2000.0)])
    assert whole == Usage(2.0, 150.0, pytest.approx(0.6), 1500.0)
    part = merge_usages(2.0, [Usage(2.0, 100.0, 0.5), Usage(2.0, unmeasured="why")])
    assert part.energy_joules is None and part.unmeasured == "why"


def test_processes_that_share_a_gpu_count_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, other = gpu_monitor.GpuId("a", None), gpu_monitor.GpuId("b", None)
    gathered = [
        (("host", gpu), Usage(1.0, 10.0)),
        (("host", gpu), Usage(1.0, 10.0)),
        (("host", other), Usage(1.0, 5.0)),
    ]
    monkeypatch.setattr(sync, "gather_object", lambda own: gathered)
    accelerator = SimpleNamespace(num_processes=3, device=CUDA)
    meter = SimpleNamespace(gpu=gpu)
    assert sync.sum_usage_over_ranks(accelerator, meter, Usage(1.0, 10.0)).energy_joules == 15.0


def test_an_epoch_without_energy_leaves_the_run_without() -> None:
    state = TrainState()
    state.add_usage(Usage(1.0, 10.0, 0.5))
    state.close_epoch()
    assert (state.energy_joules, state.busy_seconds) == (10.0, 0.5)
    state.add_usage(Usage(1.0, unmeasured="lost"))
    state.add_usage(Usage(1.0, 10.0, 0.5))
    state.close_epoch()
    assert state.energy_joules is None and state.energy_unmeasured == "lost" and state.train_seconds == 3.0


def use_gpu_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "Meter", lambda device, enabled: Meter(CUDA, enabled))


@pytest.mark.slow
def test_a_run_reports_the_usage_of_its_gpu(
    small_config: Callable[..., TrainConfig], tmp_path: Path, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpu_meter(monkeypatch)
    monkeypatch.setattr(gpu_monitor, "INTERVAL", 1000)  # two readings per measurement
    fit(small_config(epochs=2, save_every=2, stop_after=1))
    counter_seconds, nvml.counter_seconds = nvml.counter_seconds[1:], []  # the first reading shows that it exists
    summary = fit(small_config(epochs=2, save_every=2), resume="must")
    counter_seconds += nvml.counter_seconds[1:]
    readings = zip(counter_seconds[::2], counter_seconds[1::2], strict=True)
    measured_seconds = sum(after - before for before, after in readings)
    rows = read_jsonl(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert summary["energy_joules"] == pytest.approx(sum(row["energy_joules"] for row in rows))
    assert summary["energy_joules"] == pytest.approx(300 * measured_seconds, abs=1e-3 * len(counter_seconds))
    assert summary["mean_power_watts"] == pytest.approx(summary["energy_joules"] / summary["train_seconds"])
    assert summary["gpu_utilization"] == pytest.approx(0.8) and summary["energy_unmeasured"] is None
    assert all(row["mean_power_watts"] == pytest.approx(row["energy_joules"] / row["seconds"]) for row in rows)
    assert all(row["peak_memory_mib"] > 0 for row in rows)
    assert summary["energy_joules_per_image"] == pytest.approx(
        summary["energy_joules"] / (summary["steps"] * summary["batch_size"])
    )
    line = (tmp_path / "runs" / "run" / "train.log").read_text()
    assert " J  " in line and " W  GPU 80%  " in line and " MiB" in line


@pytest.mark.slow
def test_a_run_of_short_epochs_has_energy_and_its_epochs_have_none(
    small_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = SimpleNamespace(gpu=None, start=lambda: None, stop=lambda: Usage(0.4, 120.0, 0.5))
    monkeypatch.setattr(setup, "Meter", lambda device, enabled: meter)
    fit(small_config(epochs=4, stop_after=2))
    run = tmp_path / "runs" / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["energy_joules"] is None and "this took 0.8 s" in summary["energy_unmeasured"]
    summary = fit(small_config(epochs=4), resume="must")
    assert summary["energy_joules"] == pytest.approx(480) and summary["energy_unmeasured"] is None
    assert summary["energy_joules_per_image"] == pytest.approx(480 / (summary["steps"] * summary["batch_size"]))
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["energy_joules"] for row in rows] == [row["mean_power_watts"] for row in rows] == [None] * 4
    assert " J  " not in (run / "train.log").read_text()


@pytest.mark.parametrize("switched_off", [False, True])
def test_a_run_without_a_gpu_has_null_and_the_reason(
    small_config: Callable[..., TrainConfig],
    tmp_path: Path,
    nvml: FakeNvml,
    monkeypatch: pytest.MonkeyPatch,
    switched_off: bool,
) -> None:
    if switched_off:
        use_gpu_meter(monkeypatch)
    fit(small_config(epochs=1, telemetry=not switched_off))
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert summary["energy_joules"] is None and summary["mean_power_watts"] is None
    if switched_off or not torch.cuda.is_available():
        assert summary["energy_unmeasured"] == (
            "switched off with --no-telemetry" if switched_off else "the device is not an NVIDIA GPU"
        )
        assert "MiB" not in (tmp_path / "runs" / "run" / "train.log").read_text()
