"""A fake of nvidia-ml-py: GPUs in an order other than CUDA's, whose functions fail on demand."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """The base class of all errors, as in nvidia-ml-py."""


@dataclass
class Card:
    """One GPU under a steady load."""

    uuid: str
    pci_bus_id: str
    watts: float
    utilization: int = 80
    mig: bool = False
    faults: set[str] = field(default_factory=set)
    """names of the functions that fail on this GPU"""


class FakeNvml:
    """The functions that fastvit_train.utils.gpu_monitor calls; the energy counter grows with the clock `seconds`."""

    NVMLError = NVMLError

    def __init__(self, cards: list[Card], seconds: Any, init_fault: str | None = None) -> None:
        self.cards = cards
        self.seconds = seconds
        self.init_fault = init_fault
        self.calls: list[str] = []
        self.counter_seconds: list[float] = []
        """the clock at each reading of an energy counter"""

    def nvmlInit(self) -> None:
        if self.init_fault:
            raise NVMLError(self.init_fault)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        return self._find(card for card in self.cards if f"GPU-{card.uuid}" == uuid)

    def nvmlDeviceGetHandleByPciBusId(self, pci_bus_id: str) -> Card:
        return self._find(card for card in self.cards if card.pci_bus_id == pci_bus_id)

    def _find(self, found: Any) -> Card:
        card = next(found, None)
        if card is None:
            raise NVMLError("Not Found")
        return card

    def _check(self, card: Card, name: str) -> None:
        self.calls.append(name)
        if name in card.faults:
            raise NVMLError("Not Supported")

    def nvmlDeviceIsMigDeviceHandle(self, card: Card) -> int:
        return 0

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        self._check(card, "nvmlDeviceGetMigMode")
        return [int(card.mig), int(card.mig)]

    def nvmlDeviceGetTotalEnergyConsumption(self, card: Card) -> int:
        self._check(card, "nvmlDeviceGetTotalEnergyConsumption")
        self.counter_seconds.append(self.seconds())
        return round(self.counter_seconds[-1] * card.watts * 1e3)

    def nvmlDeviceGetPowerUsage(self, card: Card) -> int:
        self._check(card, "nvmlDeviceGetPowerUsage")
        return round(card.watts * 1e3)

    def nvmlDeviceGetUtilizationRates(self, card: Card) -> SimpleNamespace:
        self._check(card, "nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=card.utilization, memory=10)

    def nvmlDeviceGetClockInfo(self, card: Card, kind: int) -> int:
        self._check(card, "nvmlDeviceGetClockInfo")
        assert kind == 1
        return 1980
