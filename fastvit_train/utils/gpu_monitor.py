"""What a GPU takes and does while it works: energy, utilisation and clock, through NVML (nvidia-ml-py).

NVML's order of GPUs is not CUDA's, so a GPU is found by its UUID, or by its place on the PCI bus.
"""

import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch

INTERVAL = 0.1
"""seconds between two samples"""
COUNTED_SECONDS = 1.0
"""from here on the card's energy counter is exact enough: it moves on some ten times a second"""
CLOCK_SM = 1  # NVML_CLOCK_SM


class Gpu(NamedTuple):
    """What a GPU is found by."""

    uuid: str | None
    """without a prefix"""
    pci_bus_id: str | None
    """domain:bus:device.function, hexadecimal"""


@dataclass(frozen=True)
class Usage:
    """What some seconds of work took; None for what was not measured, never 0."""

    seconds: float
    energy_joules: float | None = None
    utilization: float | None = None
    """share of the time in which the GPU had something to do"""
    sm_clock_mhz: float | None = None
    unmeasured: str | None = None
    """why there is no energy"""

    @property
    def mean_power_watts(self) -> float | None:
        return None if self.energy_joules is None else self.energy_joules / self.seconds

    @property
    def busy_seconds(self) -> float | None:
        return None if self.utilization is None else self.utilization * self.seconds


class Unmeasured(Exception):
    """Why a device can't be measured."""


class Meter:
    """A stopwatch that measures the GPU too, with a thread that takes samples ten times a second.

    It never raises: whatever fails in NVML becomes a None and the reason for it.

    Args:
        device: the one that does the work.
        enabled: False leaves NVML alone; the meter is a stopwatch then.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self._nvml: ModuleType | None = None
        self._handle: Any = None
        self._faults: dict[str, str] = {}
        self.gpu: Gpu | None = None
        self._unmeasured: str | None = None
        self._samples: list[tuple[float, float | None, float | None, float | None]] = []
        self._counts: list[float | None] = []
        try:
            self.gpu = identify(device, enabled)
            self._nvml, self._handle = _open(self.gpu)
        except Unmeasured as reason:
            self._unmeasured = str(reason)
        self._has_counter = self._read("nvmlDeviceGetTotalEnergyConsumption") is not None

    def start(self) -> None:
        """Begin to measure."""
        self._faults, self._samples, self._counts = {}, [], []
        if self._handle is not None:
            self._stopped = threading.Event()
            self._thread = threading.Thread(target=self._keep_sampling, name="nvml", daemon=True)
            self._thread.start()
        self._started = time.perf_counter()

    def stop(self) -> Usage:
        """End what `start` began; the device's work must be done by now."""
        seconds = time.perf_counter() - self._started
        if self._handle is None:
            return Usage(seconds, unmeasured=self._unmeasured)
        self._stopped.set()
        self._thread.join()
        energy = self._energy(seconds)
        return Usage(
            seconds,
            energy,
            utilization=_mean([utilization for _, _, utilization, _ in self._samples[1:]]),
            sm_clock_mhz=_mean([clock for _, _, _, clock in self._samples]),
            unmeasured=None if energy is not None else self._why_not(),
        )

    def _why_not(self) -> str:
        return "; ".join(self._faults.values()) or "the card's count of energy did not grow"

    def _keep_sampling(self) -> None:
        self._count()
        self._sample()
        while not self._stopped.wait(INTERVAL):
            self._sample()
        self._sample()
        self._count()

    def _sample(self) -> None:
        power = self._read("nvmlDeviceGetPowerUsage")
        rates = self._read("nvmlDeviceGetUtilizationRates")
        clock = self._read("nvmlDeviceGetClockInfo", CLOCK_SM)
        self._samples.append((time.perf_counter(), power, None if rates is None else rates.gpu / 100, clock))

    def _energy(self, seconds: float) -> float | None:
        """Joules since `start`: by the card's counter, or where it has none or the time was short by the power."""
        counted = self._counted()
        integrated = self._integrated()
        preferred = (counted, integrated) if seconds >= COUNTED_SECONDS else (integrated, counted)
        return next((joules for joules in preferred if joules is not None), None)

    def _counted(self) -> float | None:
        before, after = self._counts
        return None if before is None or after is None or after <= before else (after - before) / 1e3

    def _integrated(self) -> float | None:
        powers = [(at, power) for at, power, _, _ in self._samples if power is not None]
        if len(powers) < len(self._samples):
            return None
        return sum((then - at) * (first + second) / 2 for (at, first), (then, second) in pairwise(powers)) / 1e3

    def _count(self) -> None:
        self._counts.append(self._read("nvmlDeviceGetTotalEnergyConsumption") if self._has_counter else None)

    def _read(self, name: str, *arguments: Any) -> Any:
        """What NVML's function says of the GPU, or None with the fault noted."""
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, name)(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            self._faults.setdefault(name, f"{name}: {error}")
            return None


def identify(device: torch.device, enabled: bool = True) -> Gpu:
    """What NVML knows the GPU by; raises Unmeasured where there is none."""
    if not enabled:
        raise Unmeasured("switched off with --no-telemetry")
    if device.type != "cuda" or torch.version.hip:
        raise Unmeasured("no NVIDIA GPU")
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    domain, bus, slot = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    place = None if bus is None else f"{domain or 0:08x}:{bus:02x}:{slot or 0:02x}.0"
    return Gpu(None if uuid is None else str(uuid), place)


def _open(gpu: Gpu) -> tuple[ModuleType, Any]:
    """NVML and its handle of `gpu`; raises Unmeasured where they aren't to be had."""
    try:
        import pynvml
    except ImportError:
        raise Unmeasured("nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
        handle = _find(pynvml, gpu)
    except pynvml.NVMLError as error:
        raise Unmeasured(f"NVML: {error}") from None
    if _in_mig_mode(pynvml, handle):
        raise Unmeasured("MIG: a slice of a GPU has no energy counter of its own")
    return pynvml, handle


def _find(nvml: ModuleType, gpu: Gpu) -> Any:
    for prefix in ("GPU-", "MIG-"):
        if gpu.uuid is not None:
            try:
                return nvml.nvmlDeviceGetHandleByUUID(prefix + gpu.uuid)
            except nvml.NVMLError:
                continue
    if gpu.pci_bus_id is None:
        raise Unmeasured("NVML knows no GPU of this UUID, and torch does not tell its place on the PCI bus")
    return nvml.nvmlDeviceGetHandleByPciBusId(gpu.pci_bus_id)


def _in_mig_mode(nvml: ModuleType, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceIsMigDeviceHandle(handle)) or bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # a card that can't
        return False


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def merge(seconds: float, usages: list[Usage]) -> Usage:
    """The usage of several GPUs in the same `seconds`; no energy where that of one is not known."""
    joules = [usage.energy_joules for usage in usages]
    known = [value for value in joules if value is not None]
    return Usage(
        seconds,
        energy_joules=sum(known) if len(known) == len(joules) else None,
        utilization=_mean([usage.utilization for usage in usages]),
        sm_clock_mhz=_mean([usage.sm_clock_mhz for usage in usages]),
        unmeasured=next((usage.unmeasured for usage in usages if usage.unmeasured), None),
    )
