"""The results of a sweep: a table of the trials, and a picture of the accuracy over each setting."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from rich.markup import escape
from rich.table import Table

from fastvit_train.runs.plots.drawing import escape_mathtext, save_figure
from fastvit_train.utils import atomic_io, markdown
from fastvit_train.utils.console import Terminal

RUN = "run"
"""the attribute of a trial that names its run"""
TABLE, PICTURE = "sweep.md", "sweep.png"
STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "in training",
    TrialState.WAITING: "waiting",
}
FINISHED, STOPPED = "#0072b2", "#999999"


def write_results(trials: Sequence[FrozenTrial], folder: Path) -> str:
    """Write sweep.md and sweep.png into `folder`; returns the table and where they are, as text."""
    latest = {trial.user_attrs[RUN]: trial for trial in trials if RUN in trial.user_attrs}.values()
    ranked = sorted(latest, key=_rank)
    names = list(dict.fromkeys(name for trial in ranked for name in trial.params))
    rows = [["trial", *names, "accuracy", "epochs", "state"], *(_row(trial, names) for trial in ranked)]
    atomic_io.write_atomically(
        folder / TABLE, markdown.table([[markdown.text(cell) for cell in row] for row in rows]) + "\n"
    )
    _plot(ranked, names, folder / PICTURE)
    head, *body = rows
    table = Table(*head)
    for row in body:
        table.add_row(*map(escape, row))
    with io.StringIO() as text:
        Terminal(file=text, width=200).print(table)
        best = " ".join(f"--{name.replace('_', '-')} {shown(value)}" for name, value in ranked[0].params.items())
        return (
            f"{text.getvalue()}"
            + (f"best: {best}\n" if ranked[0].state == TrialState.COMPLETE else "")
            + f"written to {folder}: {TABLE}, {PICTURE}, and a run per trial for `fastvit report`"
        )


def last_accuracy(trial: FrozenTrial) -> float | None:
    """Return the accuracy of a finished trial, or that after the last epoch of another; None if there is none."""
    if trial.value is not None:
        return trial.value
    return trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None


def _rank(trial: FrozenTrial) -> tuple[bool, float]:
    """Sort finished trials first, and the most accurate ones first among them and among the others."""
    return trial.state != TrialState.COMPLETE, -(last_accuracy(trial) or 0.0)


def _row(trial: FrozenTrial, names: Sequence[str]) -> list[str]:
    accuracy = last_accuracy(trial)
    values = [shown(trial.params.get(name)) for name in names]
    epochs = max(trial.intermediate_values, default=0)
    percent = "" if accuracy is None else f"{accuracy:.2%}"
    return [trial.user_attrs[RUN], *values, percent, str(epochs), STATES[trial.state]]


def shown(value: object) -> str:
    """Return the value of a setting with up to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(trials: Sequence[FrozenTrial], names: Sequence[str], path: Path) -> None:
    """Draw the accuracy over each setting that was searched, one panel per setting."""
    figure = Figure(figsize=(3.2 * len(names) + 1, 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for name, axes in zip(names, panels, strict=True):
        own = [trial for trial in trials if name in trial.params]
        _set_axis(axes, name, own[0].distributions[name])
        for trial in own:
            _plot_trial(axes, trial, name)
    panels[0].set_ylabel("accuracy on held-out images, %")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn = dict(zip(labels, handles, strict=True))
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper left", ncols=2, frameon=False)
    save_figure(figure, path)


def _set_axis(axes: Axes, name: str, distribution: BaseDistribution) -> None:
    """Let the axis cover what is searched."""
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        axes.set_xticks(range(len(choices)), [escape_mathtext(str(value)) for value in choices])
        axes.set_xlim(-0.5, len(choices) - 0.5)
    elif isinstance(distribution, FloatDistribution | IntDistribution):
        low, high = distribution.low, distribution.high
        if distribution.log:
            axes.set_xscale("log")
            ticks = [low, math.sqrt(low * high), high]
            axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
            axes.minorticks_off()
        axes.margins(x=0.05)
        axes.update_datalim([(low, 0), (high, 0)], updatey=False)
        axes.autoscale_view(scaley=False)
    axes.set_xlabel(escape_mathtext(name))
    axes.spines[["top", "right"]].set_visible(False)


def _plot_trial(axes: Axes, trial: FrozenTrial, name: str) -> None:
    accuracy, distribution = last_accuracy(trial), trial.distributions[name]
    if accuracy is None:
        return
    value = trial.params[name]
    x = distribution.choices.index(value) if isinstance(distribution, CategoricalDistribution) else value
    finished = trial.state == TrialState.COMPLETE
    label, color = ("finished", FINISHED) if finished else ("not finished", STOPPED)
    axes.plot(x, 100 * accuracy, "o", color=color, label=label)
