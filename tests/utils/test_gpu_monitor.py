"""The GPU's energy and utilisation, against a stand-in for nvidia-ml-py."""

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
from fastvit_train.utils.gpu_monitor import Meter, Usage, merge
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
    monkeypatch.setattr(gpu_monitor, "COUNTED_SECONDS", 0.0)
    return fake


def see_gpu(monkeypatch: pytest.MonkeyPatch, **properties: object) -> None:
    known = SimpleNamespace(pci_domain_id=1, pci_bus_id=0xCA, pci_device_id=0, **properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)


def measured(device: torch.device = CUDA, seconds: float = 0.05) -> Usage:
    meter = Meter(device)
    meter.start()
    time.sleep(seconds)
    return meter.stop()


def test_energy_is_the_cards_own_count(nvml: FakeNvml) -> None:
    meter = Meter(CUDA)
    meter.start()
    wait_until(lambda: nvml.calls.count("nvmlDeviceGetUtilizationRates") >= 5)  # the thread's
    usage = meter.stop()
    assert usage.seconds > 0
    assert usage.mean_power_watts == pytest.approx(300, rel=0.05)
    assert usage.energy_joules == pytest.approx(300 * usage.seconds, rel=0.05)
    assert (usage.utilization, usage.sm_clock_mhz, usage.unmeasured) == (pytest.approx(0.8), 1980, None)


def test_without_a_counter_power_is_integrated(nvml: FakeNvml, cards: list[Card]) -> None:
    cards[1].faults.add(COUNTER)
    usage = measured()
    assert usage.mean_power_watts == pytest.approx(300, rel=0.05)
    assert usage.unmeasured is None


def test_a_rising_load_is_integrated_not_averaged_at_its_ends(
    nvml: FakeNvml, cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards[1].faults.add(COUNTER)
    began = time.perf_counter()
    monkeypatch.setattr(nvml, POWER, lambda card: 1e6 * (time.perf_counter() - began) ** 2)
    usage = measured(seconds=0.2)
    assert usage.energy_joules == pytest.approx(1e3 * usage.seconds**3 / 3, rel=0.05)


def test_a_card_without_counter_and_power_gives_nothing_and_the_reason(nvml: FakeNvml, cards: list[Card]) -> None:
    cards[1].faults |= {COUNTER, POWER}
    usage = measured()
    assert usage.energy_joules is None and usage.mean_power_watts is None
    assert usage.unmeasured == f"{POWER}: Not Supported"
    assert usage.utilization == pytest.approx(0.8)


def test_a_gpu_that_is_lost_midway_is_no_measurement_and_no_crash(nvml: FakeNvml, cards: list[Card]) -> None:
    meter = Meter(CUDA)
    meter.start()
    time.sleep(0.02)
    cards[1].faults |= {COUNTER, POWER, "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetClockInfo"}
    time.sleep(0.02)
    usage = meter.stop()
    assert usage.energy_joules is None and usage.unmeasured and COUNTER in usage.unmeasured


@pytest.mark.parametrize("counts", [[5.0, 4.0, 3.0], [5.0, 5.0, 5.0]], ids=["back", "not at all"])
def test_a_counter_that_does_not_grow_is_no_measurement(nvml: FakeNvml, cards: list[Card], counts: list[float]) -> None:
    cards[1].faults.add(POWER)
    nvml.seconds = iter(counts).__next__
    usage = measured()
    assert usage.energy_joules is None and usage.unmeasured


def test_a_short_time_goes_by_the_power_as_the_counter_moves_in_steps(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_monitor, "COUNTED_SECONDS", 1.0)
    nvml.seconds = lambda: 0.0
    assert measured().mean_power_watts == pytest.approx(300, rel=0.05)


def test_utilisation_alone_may_be_missing(nvml: FakeNvml, cards: list[Card]) -> None:
    cards[1].faults.add("nvmlDeviceGetUtilizationRates")
    usage = measured()
    assert usage.utilization is None and usage.energy_joules is not None


@pytest.mark.parametrize("uuid", [{}, {"uuid": "unknown to NVML"}], ids=["none", "unknown"])
def test_without_a_uuid_the_place_on_the_bus_tells_the_gpu(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, uuid: dict[str, str]
) -> None:
    see_gpu(monkeypatch, **uuid)
    assert measured().mean_power_watts == pytest.approx(300, rel=0.05)


def test_a_slice_of_a_card_has_no_energy(nvml: FakeNvml, cards: list[Card]) -> None:
    cards[1].mig = True
    usage = measured()
    assert usage.energy_joules is None and usage.utilization is None and "MIG" in str(usage.unmeasured)


def test_a_card_that_knows_no_mig_is_measured(nvml: FakeNvml, cards: list[Card]) -> None:
    cards[1].faults.add("nvmlDeviceGetMigMode")
    assert measured().energy_joules is not None


def test_no_driver_no_package_and_no_gpu_give_the_reason(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.init_fault = "NVML Shared Library Not Found"
    assert measured().unmeasured == "NVML: NVML Shared Library Not Found"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert measured().unmeasured == "nvidia-ml-py is not installed"
    usage = measured(torch.device("cpu"))
    assert usage.unmeasured == "no NVIDIA GPU" and usage.energy_joules is None and usage.seconds > 0


def test_the_real_package_without_a_driver_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    see_gpu(monkeypatch, uuid="ours")
    assert "NVML" in str(measured().unmeasured)


def test_several_gpus_add_up_unless_one_is_not_measured() -> None:
    whole = merge(2.0, [Usage(2.0, 100.0, 0.5, 1000.0), Usage(2.1, 50.0, 0.7, 2000.0)])
    assert whole == Usage(2.0, 150.0, pytest.approx(0.6), 1500.0)
    part = merge(2.0, [Usage(2.0, 100.0, 0.5), Usage(2.0, unmeasured="why")])
    assert part.energy_joules is None and part.unmeasured == "why"


def test_processes_that_share_a_gpu_count_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, other = gpu_monitor.Gpu("a", None), gpu_monitor.Gpu("b", None)
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


def test_a_run_reports_what_its_gpu_took(
    small_config: Callable[..., TrainConfig], tmp_path: Path, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpu_meter(monkeypatch)
    fit(small_config(epochs=2, save_every=2, stop_after=1))
    summary = fit(small_config(epochs=2, save_every=2), resume="must")
    rows = read_jsonl(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert summary["energy_joules"] == pytest.approx(sum(row["energy_joules"] for row in rows))
    assert summary["energy_joules"] == pytest.approx(300 * summary["train_seconds"], rel=0.2)
    assert summary["gpu_utilization"] == pytest.approx(0.8) and summary["energy_unmeasured"] is None
    assert all(row["mean_power_watts"] == pytest.approx(300, rel=0.2) for row in rows)
    assert all(row["peak_memory_mib"] > 0 for row in rows)
    line = (tmp_path / "runs" / "run" / "train.log").read_text()
    assert " J  " in line and " W  GPU 80%  " in line and " MiB" in line


@pytest.mark.parametrize("switched_off", [False, True])
def test_a_run_without_a_gpu_says_null_and_why(
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
        assert summary["energy_unmeasured"] == ("switched off with --no-telemetry" if switched_off else "no NVIDIA GPU")
        assert "MiB" not in (tmp_path / "runs" / "run" / "train.log").read_text()
