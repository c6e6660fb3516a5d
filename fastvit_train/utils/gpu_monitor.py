"""Energy, utilisation and clock of a GPU while it works, read from NVML through nvidia-ml-py.

torch.cuda has power_draw, utilization and clock_rate, but they do not serve here. They do not read the energy counter.
They find the GPU by its index in CUDA_VISIBLE_DEVICES, which is NVML's index only under CUDA_DEVICE_ORDER=PCI_BUS_ID
(by default CUDA puts the fastest GPU first), and fail if the variable names a MIG instance. And they initialise NVML
anew in each call. Here a GPU is found by its UUID or its PCI address, once.
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
MIN_ENERGY_SECONDS = 1.0
"""Seconds of work from which on there is a figure of its energy.

The energy counter is updated about every 100 ms (https://ml.energy/blog/energy/measurement/
thermally-stable-profiling-for-accurate-gpu-energy-measurement), so that the energy of one second is off by up to a
tenth, and that of 30 ms is either 0 or three times too much. GPUs without the counter report power instead, as a mean
over up to a second. Several short measurements can be added, as the counter's error does not grow with their number.
"""
COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
CLOCK_SM = 1  # NVML_CLOCK_SM


class GpuId(NamedTuple):
    """What identifies a GPU, on any machine and in any order of devices."""

    uuid: str | None
    """without the prefix GPU- or MIG-"""
    pci_address: str | None
    """domain:bus:device.function, hexadecimal"""


@dataclass(frozen=True)
class Usage:
    """The GPU's usage during some seconds of work; what could not be measured is None, never 0."""

    seconds: float
    joules: float | None = None
    """to be added to those of other measurements; `energy_joules` is the figure of this one"""
    utilization: float | None = None
    """share of the time during which a kernel was running"""
    sm_clock_mhz: float | None = None
    unmeasured: str | None = None
    """why joules is None"""

    @property
    def energy_joules(self) -> float | None:
        """The energy; None if it was not measured, or in less than `MIN_ENERGY_SECONDS`."""
        return None if self.energy_unmeasured else self.joules

    @property
    def energy_unmeasured(self) -> str | None:
        """Why energy_joules is None."""
        if self.joules is None:
            return self.unmeasured or "not measured"
        if self.seconds < MIN_ENERGY_SECONDS:
            return (
                f"the GPU's energy counter needs {MIN_ENERGY_SECONDS:g} s or more, and this took {self.seconds:.2g} s"
            )
        return None if self.joules > 0 else "the GPU's energy counter did not increase"

    @property
    def mean_power_watts(self) -> float | None:
        return None if self.energy_joules is None else self.energy_joules / self.seconds

    @property
    def busy_seconds(self) -> float | None:
        return None if self.utilization is None else self.utilization * self.seconds


class Sample(NamedTuple):
    """One reading; a value that NVML does not return is None."""

    time: float
    """of time.perf_counter, seconds"""
    milliwatts: float | None
    utilization: float | None
    sm_clock_mhz: float | None


class NotMeasurable(Exception):
    """The device can't be measured; the message is the reason."""


class WorkEnergy:
    """Energy of work that pauses, from a counter that moves in steps which may be longer than work and pauses.

    What a step adds is divided between the work and the pauses since the step before by their shares of the time. So
    the energy of the work is right to about one step, however often it pauses, if pauses shorter than a step take as
    much power as the work.
    """

    def __init__(self, count: float) -> None:
        self.joules = 0.0
        self._count = count
        """the counter, mJ"""
        self._stepped = self._seen = time.perf_counter()
        """when the counter was first seen at `_count`, and when it was last read, seconds"""
        self._worked = 0.0
        """seconds of work since `_stepped`"""

    def add(self, count: float, now: float, working: bool) -> None:
        """Add the reading `count`, mJ, at the time `now`; `working` is whether the time since the last one was work."""
        self._worked += now - self._seen if working else 0.0
        self._seen = now
        if count != self._count:
            self.joules += (count - self._count) / 1e3 * self._worked / (now - self._stepped)
            self._count, self._stepped, self._worked = count, now, 0.0


class Meter:
    """A stopwatch that also measures the GPU, with a thread that takes a sample every 0.1 seconds.

    It can be started and stopped many times. It never raises: if a call of NVML fails, the value is None and the
    reason is kept.

    Args:
        device: the device to measure.
        enabled: False to use it as a stopwatch only, without NVML.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self._nvml: ModuleType | None = None
        self._handle: Any = None
        self._errors: dict[str, str] = {}
        self.gpu: GpuId | None = None
        self._unmeasured: str | None = None
        self._samples: list[Sample] = []
        try:
            self.gpu = identify_gpu(device, enabled)
            self._nvml, self._handle = _open(self.gpu)
        except NotMeasurable as reason:
            self._unmeasured = str(reason)
        count = self._read(COUNTER)
        self._counted = None if count is None else WorkEnergy(count)

    def start(self) -> None:
        """Start measuring."""
        self._errors, self._samples = {}, []
        self._joules_before = self._counted.joules if self._counted else 0.0
        self._started = time.perf_counter()
        if self._handle is not None:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._keep_sampling, name="nvml", daemon=True)
            self._thread.start()

    def stop(self) -> Usage:
        """Stop measuring and return the usage since `start`; the device must have finished its work.

        The joules of several measurements add up to the right sum; those of a short one have an error of a step of the
        GPU's counter.
        """
        self._stopped = time.perf_counter()
        seconds = self._stopped - self._started
        if self._handle is None:
            return Usage(seconds, unmeasured=self._unmeasured)
        self._stop.set()
        self._thread.join()
        joules = self._joules()
        return Usage(
            seconds,
            joules,
            # the first sample's utilisation is that of the time before `start`
            utilization=_mean([sample.utilization for sample in self._samples[1:]]),
            sm_clock_mhz=_mean([sample.sm_clock_mhz for sample in self._samples]),
            unmeasured=None if joules is not None else "; ".join(self._errors.values()),
        )

    def _keep_sampling(self) -> None:
        self._read_counter(self._started, working=False)
        self._take_sample()
        while not self._stop.wait(INTERVAL):
            self._read_counter(time.perf_counter(), working=True)
            self._take_sample()
        self._read_counter(self._stopped, working=True)
        self._take_sample()

    def _take_sample(self) -> None:
        power = self._read("nvmlDeviceGetPowerUsage")
        rates = self._read("nvmlDeviceGetUtilizationRates")
        clock = self._read("nvmlDeviceGetClockInfo", CLOCK_SM)
        self._samples.append(Sample(time.perf_counter(), power, None if rates is None else rates.gpu / 100, clock))

    def _read_counter(self, now: float, working: bool) -> None:
        if self._counted is not None:
            count = self._read(COUNTER)
            if count is not None:
                self._counted.add(count, now, working)

    def _joules(self) -> float | None:
        """Joules since `start`, by the counter or, for GPUs without one, integrated from the power."""
        if self._counted is None:
            return self._integrated_joules()
        return None if COUNTER in self._errors else self._counted.joules - self._joules_before

    def _integrated_joules(self) -> float | None:
        """Integrate the power by the trapezoidal rule; None if a sample has no power."""
        powers = [(sample.time, sample.milliwatts) for sample in self._samples if sample.milliwatts is not None]
        if len(powers) < len(self._samples):
            return None
        return sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(powers)) / 1e3

    def _read(self, name: str, *arguments: Any) -> Any:
        """Call the NVML function `name` for the GPU; if that fails, keep the reason and return None."""
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, name)(self._handle, *arguments)
        except Exception as error:  # NVMLError, or what a broken driver causes: measuring must not end a run
            self._errors.setdefault(name, f"{name}: {error}")
            return None


def identify_gpu(device: torch.device, enabled: bool = True) -> GpuId:
    """Return the names by which NVML finds the GPU; raises NotMeasurable if the device is not an NVIDIA GPU."""
    if not enabled:
        raise NotMeasurable("switched off with --no-telemetry")
    if device.type != "cuda" or torch.version.hip:
        raise NotMeasurable("the device is not an NVIDIA GPU")
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    domain, bus, slot = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    pci_address = None if bus is None else f"{domain or 0:08x}:{bus:02x}:{slot or 0:02x}.0"
    return GpuId(None if uuid is None else str(uuid), pci_address)


def _open(gpu: GpuId) -> tuple[ModuleType, Any]:
    """Return NVML and its handle of the GPU; raises NotMeasurable if one of them is not available."""
    try:
        import pynvml
    except ImportError:
        raise NotMeasurable("nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
        handle = _find_handle(pynvml, gpu)
    except pynvml.NVMLError as error:
        raise NotMeasurable(f"NVML: {error}") from None
    if _in_mig_mode(pynvml, handle):
        raise NotMeasurable("a MIG instance has no energy counter of its own")
    return pynvml, handle


def _find_handle(nvml: ModuleType, gpu: GpuId) -> Any:
    for prefix in ("GPU-", "MIG-"):
        if gpu.uuid is not None:
            try:
                return nvml.nvmlDeviceGetHandleByUUID(prefix + gpu.uuid)
            except nvml.NVMLError:
                continue
    if gpu.pci_address is None:
        raise NotMeasurable("NVML does not know the GPU's UUID, and torch does not return its PCI address")
    return nvml.nvmlDeviceGetHandleByPciBusId(gpu.pci_address)


def _in_mig_mode(nvml: ModuleType, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceIsMigDeviceHandle(handle)) or bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # the GPU does not support MIG
        return False


def _mean(values: list[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def merge_usages(seconds: float, usages: list[Usage]) -> Usage:
    """Merge the usages of several GPUs during the same `seconds`; the energy is None if it is None for one of them."""
    joules = [usage.joules for usage in usages]
    measured = [value for value in joules if value is not None]
    return Usage(
        seconds,
        joules=sum(measured) if len(measured) == len(joules) else None,
        utilization=_mean([usage.utilization for usage in usages]),
        sm_clock_mhz=_mean([usage.sm_clock_mhz for usage in usages]),
        unmeasured=next((usage.unmeasured for usage in usages if usage.unmeasured), None),
    )
