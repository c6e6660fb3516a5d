"""The options of `plan`, apart from the settings of the training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class PlanOptions:
    """What to plan, and for which network."""

    models: tuple[str, ...] = ()
    """plan these models instead of --model; `ours` stands for all of ours"""
    world_sizes: tuple[int, ...] = tuple(2**i for i in range(11))
    """numbers of processes to plan for"""
    scaling: Literal["weak", "strong"] = "weak"
    """weak: each process takes --batch-size images per step; strong: all processes together take --batch-size images"""
    link_gbps: float = 100.0
    """assumed bandwidth at which a process sends, in 10^9 bits per second"""
    latency_us: float = 20.0
    """assumed latency of a message between two processes, in microseconds"""
    steps: int = 5
    """training steps per measurement"""
    output: Path = Path("plan")
    """folder for plan.json and plan.png"""
