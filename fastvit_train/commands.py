"""The verbs of the command line: what each takes, and what it does with it. cli.py reads the flags."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fastvit_train import comparison, evaluation, launch, plots
from fastvit_train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from fastvit_train.errors import UserError
from fastvit_train.export import export_run
from fastvit_train.plan import PlanOptions
from fastvit_train.planning import plan_run
from fastvit_train.profiling import profile_run
from fastvit_train.push import push_run
from fastvit_train.repeat import fit_seeds
from fastvit_train.train import fit


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


def train(command: Train) -> None:
    if command.repeat == 1:
        fit(command.training, resume=command.resume, overwrite=command.overwrite)
    else:
        fit_seeds(command.training, command.repeat, resume=command.resume, overwrite=command.overwrite)
    launch.part()


@dataclass(frozen=True, kw_only=True)
class Profile(Settings):
    """Where a training step's time goes, and what to change first; takes the flags of a training."""

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
    """Memory, communication and speed against the number of processes; takes the flags of a training on one."""

    plan: PlanOptions = field(default_factory=PlanOptions)


def plan(command: Plan) -> None:
    plan_run(command.training, command.plan)


@dataclass(frozen=True)
class Eval:
    """Evaluate a trained model: accuracy, top-5, loss, calibration, precision and recall, confusion matrix."""

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
class Export:
    """Write a trained model for others to run, read it back as they would, and compare the two."""

    run: str
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a name of timm's"""
    to: Literal["onnx", "torch-export", "safetensors", "timm"] = "onnx"
    """onnx and torch-export take uint8 images; safetensors and timm are weights and what else is needed"""
    output: Path | None = None
    """file, or for timm folder; in export/ in the run's folder by default"""


def export(command: Export) -> None:
    export_run(command.run, command.to, command.output)


@dataclass(frozen=True)
class Push:
    """Send a trained model to the Hugging Face Hub with a model card, for you alone unless --public."""

    run: str
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a name of timm's"""
    repo: str
    """USER/NAME on the Hub"""
    public: bool = False
    """let everyone see it"""
    dry_run: bool = False
    """write what would be pushed into hub/ in the run's folder, and send nothing"""
    license: str | None = None
    """the Hub's name of a license, such as apache-2.0, for the model card"""


def push(command: Push) -> None:
    push_run(command.run, command.repo, public=command.public, dry_run=command.dry_run, license=command.license)


VERBS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "train": (Train, train),
    "profile": (Profile, profile),
    "plan": (Plan, plan),
    "eval": (Eval, evaluate),
    "compare": (Compare, compare),
    "export": (Export, export),
    "push": (Push, push),
}
"""by name: what the verb takes, and what it does"""
