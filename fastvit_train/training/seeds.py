"""Training of one configuration with several seeds, and the spread of the results."""

import json
import shlex
import signal
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed import env, sync
from fastvit_train.runs.run_folder import ResumeMode
from fastvit_train.runs.run_names import default_group, find_group
from fastvit_train.training.loop import fit_together
from fastvit_train.training.preemption import StopSignalHandler, stopped
from fastvit_train.utils.atomic_io import as_save_error, write_atomically
from fastvit_train.utils.console import Terminal
from fastvit_train.utils.errors import UserError, counted

SPREAD = {
    "accuracy": "test_accuracy",
    "balanced accuracy": "balanced_test_accuracy",
    "training, s": "train_seconds",
    "evaluation, s": "eval_seconds",
    "first passes and compiling, s": "compile_seconds",
    "to the target, s": "seconds_to_target",
    "to the target, epochs": "epochs_to_target",
    "cores used by others": "cores_used_by_others",
}
"""values of the summary that are compared over the seeds, by their titles"""


def fit_seeds(
    config: TrainConfig, repeat: int, *, resume: ResumeMode = "never", overwrite: bool = False, together: bool = False
) -> dict[str, Any]:
    """Train with `repeat` seeds, starting at `config.run.seed`, each into its own folder; see `fit`.

    Args:
        config: the settings of all runs; `-seedN` is appended to exp_name.
        repeat: number of seeds.
        resume, overwrite: as in `fit`, for each run.
        together: train all at the same time, step by step, as `fit_together` does; otherwise one after the other.

    Returns:
        The content of NAME-REPEATseeds.json in the runs' directory: the runs, and for each value its mean and its
        standard deviation (n - 1) over the seeds that have it.

    Raises:
        UserError: if `repeat` is not positive, if they can't train together, or as in `fit`.
    """
    if repeat < 1:
        raise UserError(f"--repeat {repeat} is out of range; allowed: 1 or more")
    if together:
        _check_together(config, repeat)
    seeds = range(config.run.seed, config.run.seed + repeat)
    name = config.run.exp_name
    if name is None:
        newest, free = find_group(Path(config.run.runs_dir), default_group(config), seeds)
        name = newest if overwrite or resume != "never" else free
    configs = [replace(config, run=replace(config.run, seed=seed, exp_name=f"{name}-seed{seed}")) for seed in seeds]
    if together:
        summaries = fit_together(configs, resume=resume, overwrite=overwrite)
    else:
        summaries = _fit_in_turn(configs, resume, overwrite)
    results = {"runs": [f"{name}-seed{summary['seed']}" for summary in summaries], **spread(summaries)}
    if env.is_rank0():
        path = Path(config.run.runs_dir) / f"{name}-{repeat}seeds.json"
        console = Terminal(soft_wrap=True)
        console.print(table(results))
        with as_save_error(f"{path} cannot be written"):
            write_atomically(path, json.dumps(results, indent=2) + "\n")
        runs = shlex.join(str(Path(config.run.runs_dir) / run) for run in results["runs"])
        console.print(f"written to {path}; next: fastvit compare {runs}", markup=False)
    return results


def _fit_in_turn(configs: Sequence[TrainConfig], resume: ResumeMode, overwrite: bool) -> list[dict[str, Any]]:
    """Train one run after the other; a signal that comes when one has nearly ended keeps the next from starting."""
    summaries: list[dict[str, Any]] = []
    with StopSignalHandler() as signals:
        for config in configs:
            number = sync.first_of_ranks(signals.received or None) if summaries else None
            if number is not None:
                message = f"before seed {config.run.seed}; --resume auto continues with it"
                raise stopped(number, f"{signal.Signals(number).name} {message}")
            summaries += fit_together([config], resume=resume, overwrite=overwrite, signals=signals)
    return summaries


def _check_together(config: TrainConfig, repeat: int) -> None:
    """Raise UserError if runs of several seeds cannot train at the same time in this process."""
    if repeat == 1:
        raise UserError("--together is for several seeds; give their number, as in --repeat 5 --together")
    if env.launched_world_size() > 1 or env.uses_fsdp():
        raise UserError("--together trains all seeds in one process; start only one, without FSDP, or leave it out")
    if config.data.stream == "always":
        raise UserError("--together needs the images in memory; leave it or --stream always out")
    if config.run.patience is not None:
        raise UserError("--together trains all seeds for the same number of epochs; leave it or --patience out")
    if config.run.fit_memory:
        raise UserError("--fit-memory tries one run at a time; leave it or --together out")
    if "wandb" in config.run.track:
        raise UserError("--track wandb can follow one run at a time; leave it or --together out")


def spread(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over the runs of several seeds, and how many reached the target."""
    results: dict[str, Any] = {"seeds": [summary["seed"] for summary in summaries]}
    results["target_accuracy"] = summaries[0]["target_accuracy"]
    results["reached_target"] = sum(summary["seconds_to_target"] is not None for summary in summaries)
    for key in SPREAD.values():
        values = [summary[key] for summary in summaries if summary[key] is not None]
        results[key] = {
            "values": values,
            "mean": statistics.mean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
        }
    return results


def table(results: dict[str, Any]) -> Table:
    """Return the result of `spread` as a table for the terminal."""
    seeds, target = results["seeds"], results["target_accuracy"]
    title = f"{counted(len(seeds), 'seed')}, {seeds[0]} to {seeds[-1]}"
    if target is not None:
        title += f"; {results['reached_target']} of them reached {target:.2%}"
    result = Table("", "mean", "standard deviation", "lowest", "highest", title=title)
    for name, key in SPREAD.items():
        statistic = results[key]
        if statistic["values"]:
            shown = (statistic["mean"], statistic["std"], min(statistic["values"]), max(statistic["values"]))
            words = [("" if x is None else f"{x:.2%}" if key.endswith("accuracy") else f"{x:,.1f}") for x in shown]
            result.add_row(name, *words)
    return result
