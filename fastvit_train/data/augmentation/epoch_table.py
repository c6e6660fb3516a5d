"""What an epoch draws for each sample, as indices of other samples or of images."""

import torch
from torch import Tensor


class EpochTable:
    """An index for each sample of the epoch, for samples on the CPU or on the device.

    The memory stays the same for all epochs, since a CUDA graph reads it.
    """

    def __init__(self, num_samples: int, device: torch.device) -> None:
        self._on_cpu = torch.zeros(num_samples, dtype=torch.int64)
        self._on_device = self._on_cpu.to(device)  # the same memory if the device is the CPU

    def fill(self, indices: Tensor) -> None:
        """Take over the indices of an epoch, int64 (samples,), on the CPU."""
        self._on_cpu.copy_(indices)
        self._on_device.copy_(indices)

    def __getitem__(self, samples: Tensor) -> Tensor:
        """Return the indices of `samples`, on their device."""
        return (self._on_cpu if samples.device.type == "cpu" else self._on_device)[samples]
