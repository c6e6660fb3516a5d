"""The verbs of the command line: what each takes, and what it does with it. cli.py reads the flags."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastvit_train.cli import completion, inference_verbs, training_verbs
from fastvit_train.cli.completion import Shell
from fastvit_train.cli.training_verbs import Settings

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
    "train": (training_verbs.Train, training_verbs.train),
    "profile": (training_verbs.Profile, training_verbs.profile),
    "plan": (training_verbs.Plan, training_verbs.plan),
    "eval": (inference_verbs.Eval, inference_verbs.evaluate),
    "predict": (inference_verbs.Predict, inference_verbs.predict),
    "inspect": (inference_verbs.Inspect, inference_verbs.inspect),
    "report": (inference_verbs.Report, inference_verbs.report),
    "compare": (inference_verbs.Compare, inference_verbs.compare),
    "export": (inference_verbs.Export, inference_verbs.export),
    "push": (inference_verbs.Push, inference_verbs.push),
    "models": (training_verbs.Models, training_verbs.models),
    "recipes": (training_verbs.Recipes, training_verbs.recipes),
    "completion": (Completion, complete),
}
"""by name: what the verb takes, and what it does; what it returns is the exit status, None for 0"""
