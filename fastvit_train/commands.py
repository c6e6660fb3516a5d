"""The verbs of the command line: what each takes, and what it does with it. cli.py reads the flags."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fastvit_train import catalog, comparison, completion, evaluation, launch, plots
from fastvit_train.completion import Shell
from fastvit_train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from fastvit_train.dry_run import dry_run
from fastvit_train.errors import UserError
from fastvit_train.plan import PlanOptions
from fastvit_train.planning import plan_run
from fastvit_train.predict import predict_images
from fastvit_train.profiling import profile_run
from fastvit_train.repeat import fit_seeds
from fastvit_train.report import write_report
from fastvit_train.train import fit
from fastvit_train.visualize import inspect_run


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training takes; recipe < --config < flags."""

    config: str | None = None
    """YAML file of settings, named as the flags are"""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def training(self) -> TrainConfig:
        return TrainConfig(self.run, self.model, self.data, self.optim)


@dataclass(frozen=True, kw_only=True)
class Train(Settings):
    """Train a small Vision Transformer from scratch.

    Recipe < --config < flags. The resolved settings are saved with the run as config.yaml.
    """

    resume: Literal["never", "auto", "must"] = "never"
    """go on from the run's last checkpoint: auto if there is one, must insists"""
    overwrite: bool = False
    """start over where the folder holds a run already"""
    repeat: int = 1
    """train with so many seeds, one after the other, and tell mean and spread"""
    dry_run: bool = False
    """train nothing: show settings and shapes, and by a few measured steps the memory, time and disk of one run"""


def train(command: Train) -> None:
    if command.dry_run:
        dry_run(command.training)
    elif command.repeat == 1:
        fit(command.training, resume=command.resume, overwrite=command.overwrite)
    else:
        fit_seeds(command.training, command.repeat, resume=command.resume, overwrite=command.overwrite)
    launch.part()


@dataclass(frozen=True, kw_only=True)
class Profile(Settings):
    """Where a training step's time goes, and what to change first.

    Takes the flags of a training.
    """

    steps: int = 20
    """to measure at a time"""
    output: Path = Path("profile")
    """folder for the trace and the figures"""


def profile(command: Profile) -> None:
    if command.steps < 1:
        raise UserError(f"--steps {command.steps} is out of range; allowed: 1 or more")
    profile_run(command.training, command.steps, command.output)


@dataclass(frozen=True, kw_only=True)
class Plan(Settings):
    """Memory, communication and speed against the number of processes.

    Takes the flags of a training on one.
    """

    plan: PlanOptions = field(default_factory=PlanOptions)


def plan(command: Plan) -> None:
    plan_run(command.training, command.plan)


@dataclass(frozen=True)
class Eval:
    """Evaluate a trained model: accuracy, calibration, confusion matrix.

    And top-5 accuracy, loss, and the precision and recall of each class.
    """

    run: str
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a name of timm's"""
    dataset: Literal["digits", "cifar10", "cifar100", "fashion-mnist", "folder", "synthetic"] | None = None
    """what to evaluate on; by default what the run was evaluated on"""
    data_dir: str | None = None
    """where the data lies, if no longer where the run found it"""
    attention: str | None = None
    """how attention is computed; the run's own by default"""
    batch_size: int = RunConfig.eval_batch_size
    """images per step and process"""
    output: Path | None = None
    """folder for evaluation.json and confusion.png; eval/ in the run's folder by default"""


def evaluate(command: Eval) -> None:
    evaluated = evaluation.evaluate_run(
        command.run,
        dataset=command.dataset,
        data_dir=command.data_dir,
        attention=command.attention,
        batch_size=command.batch_size,
    )
    evaluation.show(evaluated, command.output)
    launch.part()


@dataclass(frozen=True)
class Compare:
    """Put runs side by side: a table, and their curves in one picture."""

    runs: tuple[Path, ...]
    """folders of finished runs"""
    output: Path = Path("curves.png")
    """where the picture goes"""
    markdown: bool = False
    """print the table as Markdown"""


def compare(command: Compare) -> None:
    runs = list(command.runs)
    if not runs:
        raise UserError("compare takes the folders of one or more runs, as in: compare runs/a runs/b")
    if command.markdown:
        print(comparison.markdown(runs))
    else:
        Console().print(comparison.table(runs))
    plots.plot_curves(runs, command.output, comparison.datasets(runs))
    print(f"written to {command.output}")


@dataclass(frozen=True)
class Predict:
    """Say what images show: the most probable classes of each."""

    run: str
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a name of timm's"""
    images: tuple[str, ...]
    """files, folders, patterns; - reads an image, or names of images, from standard input"""
    top: int = 3
    """classes to tell of each image"""
    json: bool = False
    """print a line of JSON per image"""
    show: bool = False
    """draw the images with their predictions"""
    batch_size: int = 256
    """images at a time"""
    output: Path | None = None
    """folder for the pictures of --show; predictions/ in the run's folder by default"""


def predict(command: Predict) -> int:
    launch.check_alone("predict")
    broken = predict_images(
        command.run,
        command.images,
        top=command.top,
        batch_size=command.batch_size,
        as_json=command.json,
        show=command.show,
        output=command.output,
    )
    return 1 if broken else 0


@dataclass(frozen=True)
class Inspect:
    """Draw what a trained model looks at, and what it has learned of positions and patches."""

    run: str
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a name of timm's"""
    images: tuple[str, ...]
    """image files; by default one of each class of the test set"""
    data_dir: str | None = None
    """where the test set lies, if no longer where the run found it"""
    output: Path | None = None
    """folder for the pictures; inspect/ in the run's folder by default"""


def inspect(command: Inspect) -> None:
    launch.check_alone("inspect")
    for path in inspect_run(command.run, command.images, command.output, command.data_dir):
        print(f"written to {path}")


@dataclass(frozen=True)
class Report:
    """Write a page of HTML on one run or several: figures, curves, mistakes, and where the models look."""

    runs: tuple[str, ...]
    """runs' folders, local-dir:FOLDER, hf-hub:USER/MODEL, or names of timm's"""
    output: Path | None = None
    """the page; report.html in the first run's folder by default"""
    data_dir: str | None = None
    """where the data lies, if no longer where the runs found it"""


def report(command: Report) -> None:
    launch.check_alone("report")
    print(f"written to {write_report(command.runs, command.output, command.data_dir)}")


class Models:
    """List the models: their sizes, and their speed on this machine.

    Ours, unless a pattern is given.
    """

    pattern: str | None = None
    """list all of ours and timm's whose name fits, as vit_tiny* does"""
    measure: bool = True
    """time training steps and inference, which takes some seconds"""


def models(command: Models) -> None:
    catalog.show_models(command.pattern, command.measure)


@dataclass(frozen=True)
class Recipes:
    """List the recipes, or show one as the YAML that --config takes."""

    recipe: tuple[str, ...]
    """the one to show; without, all are listed"""


def recipes(command: Recipes) -> None:
    if len(command.recipe) > 1:
        raise UserError("recipes shows one at a time, as in: recipes fast-cifar10; without a name it lists all")
    if command.recipe:
        print(catalog.recipe_yaml(command.recipe[0]), end="")
    else:
        catalog.show_recipes()


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
    "train": (Train, train),
    "profile": (Profile, profile),
    "plan": (Plan, plan),
    "eval": (Eval, evaluate),
    "predict": (Predict, predict),
    "inspect": (Inspect, inspect),
    "report": (Report, report),
    "compare": (Compare, compare),
    "models": (Models, models),
    "recipes": (Recipes, recipes),
    "completion": (Completion, complete),
}
"""by name: what the verb takes, and what it does; what it returns is the exit status, None for 0"""
