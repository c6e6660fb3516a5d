"""The weights that a run ends with: the last ones, those of the best epoch, or an average of the last epochs."""

from itertools import accumulate
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from fastvit_train.config.resolved import ResolvedConfig
from fastvit_train.distributed import env, sync
from fastvit_train.runs.results import AVERAGE, BEST_EPOCH, BEST_WEIGHTS, LAST_EPOCH
from fastvit_train.training.session import TrainSession
from fastvit_train.utils.errors import UserError, counted


def build_average(model: nn.Module, config: ResolvedConfig) -> AveragedModel | None:
    """Build the average of the last epochs' weights that --average-last asks for; it is still empty.

    Raises:
        UserError: if the run or an extension has fewer epochs, or if the launch shards the weights.
    """
    last = config.run.average_last
    if last is None:
        return None
    if last > (fewest := min(config.run.cycles)):
        flag = "--epochs" if fewest == config.run.epochs else "--extend"
        raise UserError(f"--average-last {last} needs more epochs than {flag} {fewest}")
    if env.uses_fsdp():
        raise UserError("--average-last needs unsharded weights, and FSDP shards them; leave it out, or use DDP")
    # torch's default on a GPU can't average the integers that batch norm counts its batches with.
    return AveragedModel(model, avg_fn=get_swa_avg_fn(), use_buffers=True)


def add_to_average(session: TrainSession) -> None:
    """Add the weights after the completed epoch to the average, if it is one of the last of the run or an extension."""
    last, epoch = session.config.run.average_last, session.state.epoch
    if session.average is None or last is None:
        return
    end = next(end for end in accumulate(session.config.run.cycles) if epoch <= end)
    if epoch == end - last + 1:
        session.average.n_averaged.zero_()
    if epoch > end - last:
        session.average.update_parameters(session.accelerator.unwrap_model(session.eval_model))


def is_out_of_patience(session: TrainSession) -> bool:
    """Whether --patience epochs have passed since the best one."""
    patience, steps = session.config.run.patience, session.train_loader.steps_per_epoch
    state = session.state
    return patience is not None and state.best_step >= 0 and state.step - state.best_step >= patience * steps


def bring_back(session: TrainSession) -> str:
    """Load the weights that the run is to end with into the model that is evaluated and saved, on all ranks.

    Returns:
        What they are: LAST_EPOCH, BEST_EPOCH or AVERAGE. The latter two have to be evaluated.
    """
    run, state, log = session.config.run, session.state, session.log
    if session.average is not None and state.epoch == run.total_epochs:
        session.accelerator.unwrap_model(session.eval_model).load_state_dict(session.average.module.state_dict())
        log.line(f"the final weights are the average of those after the last {counted(run.average_last or 0, 'epoch')}")
        return AVERAGE
    if run.patience is None or state.best_step == state.step:
        return LAST_EPOCH
    epoch = state.best_step // session.train_loader.steps_per_epoch
    if not _load_best(session):
        log.line(f"the final weights are those of the last epoch: {BEST_WEIGHTS} is not that of epoch {epoch}")
        return LAST_EPOCH
    log.line(f"the final weights are those of epoch {epoch}, the best one")
    if session.dataset.evaluated_on == "test":
        log.line("it was chosen on the test images, so the accuracy is biased upwards; --holdout 0.1 avoids this")
    return BEST_EPOCH


def _load_best(session: TrainSession) -> bool:
    """Load the best epoch's weights on all ranks; returns whether they are there."""
    path, step = session.folder.root / BEST_WEIGHTS, str(session.state.best_step)

    def is_there() -> bool:
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("step") == step

    if not sync.broadcast_from_rank0(session.accelerator, is_there):
        return False
    weights: dict[str, Any] = load_file(path) if session.accelerator.is_main_process else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=session.accelerator.num_processes > 1)
    set_model_state_dict(session.eval_model, weights, options=options)
    return True
