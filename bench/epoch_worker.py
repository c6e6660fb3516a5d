"""A process that trains for one epoch per request: `python -m bench.epoch_worker ROW BATCH HOLDOUT`.

It reads a line per epoch from standard input and writes a line of JSON for each. Every row has its own process, as a
training has.
"""

import contextlib
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any, cast

import psutil
import torch
from torch import Tensor

from bench.typical import Script
from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import recipe
from fastvit_train.config.resolved import InputSize
from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.datasets import load_dataset
from fastvit_train.utils import memory

MODEL = "mc_vit_4_4_32"
SEED = 0
"""of every row; the typical script draws its weights, batches and crops from it"""
PRECISIONS = {"fp32": "no", "bf16": "bf16", "compiled": "bf16"}
"""mixed precision of our trainer's rows"""
Epoch = Callable[[], tuple[float, int]]
"""trains for one epoch; returns the mean loss and the number of images"""


def config(batch: int, holdout: float, runs_dir: str = "runs") -> TrainConfig:
    """Return the upstream's recipe on synthetic images, which the typical script also trains on."""
    settings: dict[str, Any] = {"dataset": "synthetic", "holdout": holdout, "batch_size": batch, "epochs": 10**6}
    return override(
        recipe("upstream-cifar10"), {**settings, "seed": SEED, "runs_dir": runs_dir, "exp_name": "bench"}, "the bench"
    )


def typical(batch: int, holdout: float) -> tuple[Epoch, int]:
    """Return a function that trains the typical script for one epoch, and its number of parameters."""
    train = load_dataset(config(batch, holdout).data, InputSize(3, 32, 32)).train
    torch.manual_seed(SEED)
    script = Script(MODEL, cast(Tensor, train.images), train.labels, batch)
    script.check()
    return script.epoch, sum(p.numel() for p in script.model.parameters())


def ours(row: str, batch: int, holdout: float, runs_dir: str) -> tuple[Epoch, int]:
    """Return a function that trains our trainer for one epoch, and its number of parameters."""
    # imported here, so that the typical script's process spends no time or memory on it
    from fastvit_train.training.display.progress_bar import ProgressBar
    from fastvit_train.training.loop import train_epoch
    from fastvit_train.training.setup import setup

    os.environ["ACCELERATE_MIXED_PRECISION"] = PRECISIONS[row]
    compiled = override(config(batch, holdout, runs_dir), {"compile": row == "compiled"}, "the bench")
    session = setup(compiled, "never", overwrite=False)
    bar = ProgressBar(session.log.console, 1, 1, 1)

    def epoch() -> tuple[float, int]:
        train_epoch(session, bar)
        loss = sum(session.state.epoch_losses) / len(session.state.epoch_losses)
        session.state.close_epoch()
        return loss, session.train_loader.steps_per_epoch * session.batch_size

    return epoch, sum(p.numel() for p in session.bare_model.parameters())


def peak_mib() -> dict[str, float]:
    """Return the peak memory in MiB: on a GPU as CUDA reports it, on a CPU resident, with the loader's workers."""
    if torch.cuda.is_available():
        return {"peak_memory_mib": memory.peak_mib(torch.device("cuda"))}
    children = [child.memory_full_info() for child in psutil.Process().children(recursive=True)]
    own = memory.peak_mib(torch.device("cpu"))
    # memory that workers share with this process counts once
    return {"peak_rss_mib": own + sum(getattr(child, "uss", child.rss) for child in children) / 2**20}


def main() -> None:
    gc.freeze()  # as our command does; the typical script is not slower for it
    row, batch, holdout = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        epoch, parameters = ours(row, batch, holdout, folder) if row in PRECISIONS else typical(batch, holdout)
        answers.write(json.dumps({"parameters": parameters}) + "\n")
        memory.reset_peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        for _ in sys.stdin:
            loss, images = epoch()
            answers.write(json.dumps({"loss": loss, "images": images, "memory": peak_mib()}) + "\n")


if __name__ == "__main__":
    main()
