"""Folders of runs as a training writes them, without a training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvit_train.config import settings_file
from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import recipe


def write_run(folder: Path, epochs: int = 4, **columns: Sequence[float]) -> Path:
    """Write the metrics and the losses of a run of ten steps per epoch; `columns` replaces values of the epochs."""
    values: dict[str, Any] = {
        "epoch": range(1, epochs + 1),
        "step": range(10, 10 * epochs + 1, 10),
        "train_loss": [2 / (1 + epoch) for epoch in range(epochs)],
        "test_loss": [2.5 / (1 + epoch) for epoch in range(epochs)],
        "test_accuracy": [1 - 0.9 / (1 + epoch) for epoch in range(epochs)],
        "images_per_second": [100.0] * epochs,
        "seconds": [2.0] * epochs,
        "eval_seconds": [0.5] * epochs,
        "peak_memory_mib": [300.0] * epochs,
        **columns,
    }
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    folder.mkdir(parents=True)
    _write_lines(folder / "metrics.jsonl", rows)
    _write_lines(folder / "steps.jsonl", [{"step": step, "loss": 20 / step} for step in range(1, 10 * epochs + 1)])
    return folder


def write_config(folder: Path, **settings: object) -> Path:
    """Write config.yaml with settings of the quickstart recipe replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    config = override(recipe("quickstart"), {"epochs": 10, **settings}, "the test")
    (folder / "config.yaml").write_text(settings_file.to_file(config), encoding="utf-8")
    return folder


def write_summary(folder: Path, **values: object) -> Path:
    """Write the summary of a finished run."""
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    summary = {
        "model": "mc_vit_4_4_32", "dataset": "digits", "evaluated_on": "test", "recipe": "quickstart",
        "parameters": 1234, "model_size_mb": 0.5, "epochs": len(rows), "test_loss": 0.5, "test_accuracy": 0.75,
        "best_test_accuracy": 0.8, "train_seconds": 8.0, "images_per_second": 100.0, "mixed_precision": "no",
        "device": "cpu", "versions": {"torch": "2"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps({**summary, **values}))
    return folder


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
