"""The verbs that train or prepare training runs; each imports what it needs when it runs."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from fastvit_train.cli.arguments import ConfigFile, Pattern, RecipeName, Search
from fastvit_train.config.names import check_attention_name
from fastvit_train.config.recipes import recipe
from fastvit_train.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from fastvit_train.config.validation import FLAGS, DatasetName, FolderName, checked
from fastvit_train.distributed.slow_imports import slow_imports
from fastvit_train.profiling.scaling_options import PlanOptions
from fastvit_train.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a training run; flags override --config, which overrides the recipe."""

    config: ConfigFile = None
    """YAML file of settings with the names of the flags"""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def training(self) -> TrainConfig:
        check_attention_name(self.model.attention)  # typos are reported before torch is imported
        checked("dataset", self.data.dataset, DatasetName, FLAGS)
        return TrainConfig(self.run, self.model, self.data, self.optim)


@dataclass(frozen=True, kw_only=True)
class Train(Settings):
    """Train a small Vision Transformer from scratch.

    Flags override --config, which overrides the recipe. The run's folder holds the resulting config.yaml.
    """

    resume: Literal["never", "auto", "must"] = "never"
    """resume from the run's last checkpoint: auto resumes if there is one, must fails if there is none"""
    overwrite: bool = False
    """replace the run that the folder already holds"""
    repeat: int = 1
    """train N times with consecutive seeds, and report mean and spread"""
    together: bool = False
    """train the seeds of --repeat at the same time; with --compile on one GPU, their steps are one CUDA graph"""
    dry_run: bool = False
    """do not train: show settings and shapes, measure a few steps, and estimate memory, time and disk space"""
    preview: Path | None = None
    """do not train: draw the augmented images of the first step into this PNG file"""


def train(command: Train) -> None:
    config = command.training
    with slow_imports():
        from fastvit_train.distributed.accelerator import leave_process_group
        from fastvit_train.profiling.estimate import dry_run
        from fastvit_train.training.display.preview import preview
        from fastvit_train.training.loop import fit
        from fastvit_train.training.seeds import fit_seeds

    if command.dry_run and command.preview:
        raise UserError("--dry-run and --preview can't be combined; give one of them")
    if command.preview and (command.repeat > 1 or command.together or command.overwrite or command.resume != "never"):
        raise UserError("--preview trains nothing; leave out --repeat, --together, --resume and --overwrite")
    if command.dry_run:
        dry_run(config)
    elif command.preview:
        preview(config, command.preview)
    elif command.repeat == 1 and not command.together:
        fit(config, resume=command.resume, overwrite=command.overwrite)
    else:
        fit_seeds(config, command.repeat, resume=command.resume, overwrite=command.overwrite, together=command.together)
    leave_process_group()


@dataclass(frozen=True, kw_only=True)
class Profile(Settings):
    """Profile a training step, and suggest what to change first.

    Takes the flags of train.
    """

    steps: int = 20
    """number of steps per measurement"""
    output: Path = Path("profile")
    """folder for the trace and the measured numbers"""


def profile(command: Profile) -> None:
    if command.steps < 1:
        raise UserError(f"--steps {command.steps} is out of range; allowed: 1 or more")
    config = command.training
    with slow_imports():
        from fastvit_train.profiling.step_profile import profile_run

    profile_run(config, command.steps, command.output)


@dataclass(frozen=True, kw_only=True)
class Plan(Settings):
    """Estimate memory, communication and speed on many processes.

    Takes the flags of train, and runs in one process.
    """

    plan: PlanOptions = field(default_factory=PlanOptions)


def plan(command: Plan) -> None:
    config = command.training
    with slow_imports():
        from fastvit_train.profiling.scaling import plan_run

    plan_run(config, command.plan)


@dataclass(frozen=True, kw_only=True)
class Sweep(Settings):
    """Search for the best settings, on held-out training images.

    Takes the flags of train. The same command in several processes shares the trials out; a stopped sweep goes on.
    """

    search: Search
    """what to search: lr=1e-3..3e-2:log, depth=2..6, or momentum=0.9,0.95"""
    trials: int = 20
    """number of trials in all"""
    name: str = "sweep"
    """name of the sweep's folder in --runs-dir"""
    prune: bool = True
    """stop trials early that are worse than half of the others after the same epoch"""


def sweep(command: Sweep) -> None:
    if command.trials < 1:
        raise UserError(f"--trials {command.trials} is out of range; allowed: 1 or more")
    if find_spec("optuna") is None:
        raise UserError("sweep needs optuna; pip install optuna")
    config = command.training
    with slow_imports():
        from fastvit_train.distributed import preflight
        from fastvit_train.training.sweep.study import sweep

    preflight.check_single_process("sweep")
    preflight.check_not_launched("sweep")
    sweep(config, command.search, command.trials, checked("name", command.name, FolderName, "--name"), command.prune)


@dataclass(frozen=True)
class Models:
    """List models with their sizes and their speed on this machine.

    Lists our models unless a pattern is given.
    """

    pattern: Pattern = None
    """list all models, ours and timm's, whose name matches, as in vit_tiny*"""
    measure: bool = True
    """time training steps and inference; this takes a few seconds"""


def models(command: Models) -> None:
    with slow_imports():
        from fastvit_train.profiling.catalog import show_models

    show_models(command.pattern, command.measure)


@dataclass(frozen=True)
class Recipes:
    """List the recipes, or show one as the YAML that --config takes."""

    recipe: RecipeName
    """recipe to show; default: list all"""


def recipes(command: Recipes) -> None:
    if len(command.recipe) > 1:
        raise UserError("recipes shows one recipe at a time, as in: recipes fast-cifar10; without a name it lists all")
    if command.recipe:
        config = recipe(command.recipe[0])
        from fastvit_train.config import settings_file

        print(settings_file.to_yaml(config), end="")
    else:
        with slow_imports():
            from fastvit_train.profiling.catalog import show_recipes

        show_recipes()
