"""The table of the verbs: what each takes, and the function that runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastvit_train.cli import inference_verbs, training_verbs
from fastvit_train.cli.completion import Shell, script

SCRIPT = "fastvit"
"""the command that the package installs"""
DEFAULT_VERB = "train"


@dataclass(frozen=True)
class Completion:
    """Print the script that completes verbs, flags and names in a shell.

    Its first lines say how to install it.
    """

    shell: Shell
    """the shell to write the script for"""


def complete(command: Completion) -> None:
    print(script(command.shell, SCRIPT, verb_types(), DEFAULT_VERB), end="")


VERBS: dict[str, tuple[type[Any], Callable[[Any], int | None]]] = {
    "train": (training_verbs.Train, training_verbs.train),
    "profile": (training_verbs.Profile, training_verbs.profile),
    "plan": (training_verbs.Plan, training_verbs.plan),
    "sweep": (training_verbs.Sweep, training_verbs.sweep),
    "eval": (inference_verbs.Eval, inference_verbs.evaluate),
    "predict": (inference_verbs.Predict, inference_verbs.predict),
    "inspect": (inference_verbs.Inspect, inference_verbs.inspect),
    "report": (inference_verbs.Report, inference_verbs.report),
    "compare": (inference_verbs.Compare, inference_verbs.compare),
    "watch": (inference_verbs.Watch, inference_verbs.watch),
    "export": (inference_verbs.Export, inference_verbs.export),
    "push": (inference_verbs.Push, inference_verbs.push),
    "models": (training_verbs.Models, training_verbs.models),
    "recipes": (training_verbs.Recipes, training_verbs.recipes),
    "completion": (Completion, complete),
}
"""by name: the verb's dataclass, and its function, which returns the exit status (None for 0)"""


def verb_types() -> dict[str, type[Any]]:
    """The verbs' dataclasses by name."""
    return {name: takes for name, (takes, _) in VERBS.items()}
