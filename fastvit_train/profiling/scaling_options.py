"""The options of `plan`, apart from the settings of the training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple


class Link(NamedTuple):
    """What a message between two processes takes."""

    gbps: float
    """bandwidth at which a process sends, in 10^9 bits per second"""
    latency_us: float
    """microseconds per message"""


LINKS = {"nvlink": Link(2400.0, 3.0), "infiniband": Link(400.0, 10.0), "ethernet": Link(100.0, 20.0)}
"""assumptions: NVLink 3 of an A100 (300 GB/s in each direction), one NDR adapter per GPU, 100 Gb/s Ethernet with TCP"""


@dataclass(frozen=True)
class PlanOptions:
    """What to plan, and for which network."""

    models: tuple[str, ...] = ()
    """plan these models instead of --model; `ours` stands for all of ours"""
    world_sizes: tuple[int, ...] = tuple(2**i for i in range(11))
    """numbers of processes to plan for"""
    scaling: Literal["weak", "strong"] = "weak"
    """weak: each process takes --batch-size images per step; strong: all processes together take --batch-size images"""
    link: Literal["nvlink", "infiniband", "ethernet"] = "ethernet"
    """the network, assumed to have 2,400 Gb/s per process and 3 us per message (nvlink: the GPUs of one machine), 400
    Gb/s and 10 us (infiniband: an adapter per GPU), or 100 Gb/s and 20 us (ethernet)"""
    link_gbps: float | None = None
    """bandwidth at which a process sends, in 10^9 bits per second, in place of that of --link"""
    latency_us: float | None = None
    """latency of a message between two processes, in microseconds, in place of that of --link"""
    steps: int = 5
    """training steps per measurement"""
    output: Path = Path("plan")
    """folder for plan.json and plan.png"""

    @property
    def network(self) -> Link:
        """The assumed network: that of `link`, except for what was given."""
        preset = LINKS[self.link]
        return Link(
            preset.gbps if self.link_gbps is None else self.link_gbps,
            preset.latency_us if self.latency_us is None else self.latency_us,
        )
