"""The package as a library: what the command line does, as calls."""

from pathlib import Path
from typing import Any

from fastvit_train.config import DatasetName, override
from fastvit_train.evaluate import Evaluation
from fastvit_train.evaluation import evaluate_run
from fastvit_train.loaded import LoadedRun, load_run
from fastvit_train.recipes import recipe as recipe_of
from fastvit_train.tracking import Resume
from fastvit_train.train import fit

__all__ = ["Evaluation", "LoadedRun", "evaluate", "load_run", "train"]


def train(
    recipe: str = "quickstart", *, resume: Resume = "never", overwrite: bool = False, **settings: Any
) -> dict[str, Any]:
    """Train a model and write its run folder, `runs_dir/exp_name`; returns what summary.json holds.

    Accuracies in it are fractions, losses nats, times seconds; what was not measured is None.

    Args:
        recipe: named settings to start from, as in `python -m fastvit_train recipes`.
        resume: "auto" goes on from the run's last checkpoint if there is one, "must" insists on it.
        overwrite: start over where the folder holds a run already.
        settings: by the flags' names, with _ for -: `epochs=3, model="c_vit_4_4_32", exp_name="try"`.

    Raises:
        UserError: for anything wrong with the settings, the data, the launch or the run's folder.
        Preempted: where SIGTERM or SIGUSR1 told the run to stop; its checkpoint is written.
    """
    config = override(recipe_of(recipe), settings, "train()")
    return fit(config, resume=resume, overwrite=overwrite)


def evaluate(
    run: str | Path, dataset: DatasetName | None = None, data_dir: str | None = None, attention: str | None = None
) -> Evaluation:
    """Evaluate a trained model; all processes of the launch do it together and get the same.

    Args:
        run: as in `load_run`.
        dataset: evaluate on its test set; by default on what the run was evaluated on, be it held out of training.
        data_dir: where it lies, if no longer where the run found it.
        attention: how attention is computed; by default as in the run, or plainly.

    Raises:
        UserError: where the model, the attention or the data isn't to be had, or the data has other classes.
    """
    return evaluate_run(run, dataset=dataset, data_dir=data_dir, attention=attention).evaluation
