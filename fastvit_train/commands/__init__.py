"""The verbs of the command line: what each takes, and what it does with it. cli.py reads the flags."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastvit_train import completion
from fastvit_train.commands import trained, training
from fastvit_train.commands.training import Settings
from fastvit_train.completion import Shell

__all__ = ["SCRIPT", "VERBS", "Settings"]


@dataclass(frozen=True)
class Completion:
    """Print the script that completes verbs, flags and names in a shell.

    How to install it stands in its first lines.
    """

    shell: Shell
    """whose script"""


def complete(command: Completion) -> None:
    print(completion.script(command.shell, SCRIPT, {name: takes for name, (takes, _) in VERBS.items()}), end="")


SCRIPT = "fastvit"
"""what the package installs"""
VERBS: dict[str, tuple[type[Any], Callable[[Any], int | None]]] = {
    "train": (training.Train, training.train),
    "profile": (training.Profile, training.profile),
    "plan": (training.Plan, training.plan),
    "eval": (trained.Eval, trained.evaluate),
    "predict": (trained.Predict, trained.predict),
    "inspect": (trained.Inspect, trained.inspect),
    "report": (trained.Report, trained.report),
    "compare": (trained.Compare, trained.compare),
    "export": (trained.Export, trained.export),
    "push": (trained.Push, trained.push),
    "models": (training.Models, training.models),
    "recipes": (training.Recipes, training.recipes),
    "completion": (Completion, complete),
}
"""by name: what the verb takes, and what it does; what it returns is the exit status, None for 0"""
