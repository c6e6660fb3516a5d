"""Everything a training run needs, built from its configuration and checked before anything is written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from timm.utils import ModelEmaV3
from torch import nn

from fastvit_train.config.overrides import validate
from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.loader import RankInfo, check_batch_size, fit_batch_size
from fastvit_train.distributed import env, parallelize, preflight, sync
from fastvit_train.distributed.accelerator import be_deterministic, device_name, start_accelerator
from fastvit_train.models import (
    build_model,
    check_attention,
    check_model,
    compile_model,
    pick_attention,
    plain_attention,
    set_attention,
    warm_up,
)
from fastvit_train.models.attention import AUTO, COMPILING
from fastvit_train.runs import checkpoint
from fastvit_train.runs.lock import RunLock
from fastvit_train.runs.log import Journal, Log
from fastvit_train.runs.run_folder import Resume, RunFolder
from fastvit_train.runs.train_state import TrainState
from fastvit_train.training.inputs import (
    build_eval_loader,
    build_train_loader,
    image_size,
    load_data,
    num_classes,
    whiten,
)
from fastvit_train.training.optimizer import build_optimizer, build_schedule, check_optimizer
from fastvit_train.training.preemption import StopRequest, Watch
from fastvit_train.training.session import TrainSession
from fastvit_train.utils import memory
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.gpu_monitor import Meter


def resolve(config: TrainConfig) -> TrainConfig:
    """`config` with the defaults that depend on other settings filled in.

    Raises:
        UserError: where a name is unknown or a number out of range.
    """
    validate(config)
    check_model(config.model.model)
    check_attention(config.model)
    check_optimizer(config.optim.optimizer)
    model = replace(config.model, image_size=image_size(config))
    name = f"{config.data.dataset}-{model.model}-seed{config.run.seed}"
    return replace(config, model=model, run=replace(config.run, exp_name=config.run.exp_name or name))


def setup(
    config: TrainConfig, resume: Resume, overwrite: bool, stop_request: StopRequest | None = None
) -> TrainSession:
    """Build the run that `config` describes, or bring it back where it is to be resumed.

    Args:
        config, resume, overwrite: as in `fit`.
        stop_request: what tells the run to stop; by default nothing does.

    Raises:
        UserError: for anything wrong with the configuration, the data, the launch or the run's folder.
    """
    config = resolve(config)
    threads = env.use_all_cores()
    folder = RunFolder(Path(config.run.runs_dir) / str(config.run.exp_name))
    preflight.check_compiled_once(config.run.compile)
    if config.run.deterministic:
        be_deterministic()
    accelerator = start_accelerator(config.optim.grad_accum, config.run.track, folder.root)
    if accelerator.device.type == "cpu":
        memory.retain_freed_memory()
    log = Log(accelerator.is_main_process)
    sync.broadcast_from_rank0(accelerator, RunLock(folder.root).check)
    resuming = sync.broadcast_from_rank0(accelerator, lambda: folder.check(config, resume, overwrite))
    if resuming and config.model.attention == AUTO:
        config = sync.broadcast_from_rank0(accelerator, lambda: folder.with_recorded_attention(config))
        check_attention(config.model, recorded_in=folder.config)
    check_batch_size(config.run.batch_size, accelerator.num_processes, config.optim.grad_accum)
    check_buildable(config)

    dataset = load_data(config, accelerator)
    batch_size = fit_batch_size(
        config.run.batch_size, len(dataset.train.labels), accelerator.num_processes, config.optim.grad_accum
    )
    set_seed(config.run.seed)
    model = build_model(config.model, image_size(config), num_classes(config, dataset))
    if config.model.patch_init == "whiten":
        whiten(model, config, dataset)
    set_seed(config.run.seed, device_specific=True)  # dropout must differ between ranks, weights must not
    micro_batch = batch_size // accelerator.num_processes // config.optim.grad_accum
    said: list[str] = []
    if config.model.attention == AUTO:
        measure = not config.run.deterministic  # what is fastest differs from run to run, and rounds differently
        name, said = choose_attention(model, micro_batch, image_size(config), accelerator, measure)
        config = replace(config, model=replace(config.model, attention=name))
    rank_info = RankInfo(accelerator.device, accelerator.process_index, accelerator.num_processes)
    train_loader = build_train_loader(config, dataset, model, batch_size, rank_info)
    eval_loader = build_eval_loader(config, dataset, model, rank_info)
    if config.run.compile:
        compile_model(model, graphed=cuda_graphs_serve(config, accelerator))
    optimizer = build_optimizer(model, config.optim)
    scheduler = build_schedule(optimizer, config.optim, config.run.epochs, train_loader.steps_per_epoch)
    ema = build_ema(model, config, accelerator)
    model, optimizer = parallelize.prepare(accelerator, model, optimizer)
    if ema is not None:
        accelerator.prepare_model(ema.module, evaluation_mode=True)  # after the model: so are they named when saved
    compile_seconds = None
    if config.run.compile or config.model.attention in COMPILING:
        compile_seconds = warm_up(model, micro_batch, eval_loader.batch_size, image_size(config), rank_info.device)
        if ema is not None:
            compile_seconds += warm_up(ema.module, 0, eval_loader.batch_size, image_size(config), rank_info.device)
    memory.reset_peak_memory(accelerator.device)

    lock, stale = sync.run_on_all_ranks(accelerator, lambda: folder.lock() if log.speaks else (None, []))
    try:
        if sync.broadcast_from_rank0(accelerator, lambda: folder.check(config, resume, overwrite)) != resuming:
            raise UserError(f"{folder.root} has changed while this run was being set up; start it again")
        progress = TrainState()
        damaged: list[str] = []
        if resuming:
            progress, damaged = checkpoint.load(
                folder.checkpoints, accelerator, scheduler, dataset.identity(), parallelize.check_checkpoint
            )
        sync.broadcast_from_rank0(accelerator, lambda: _open_folder(folder, config, progress, resuming, log))
    except UserError:
        if lock is not None:
            lock.release()
        raise
    job = TrainSession(
        config, folder, log, accelerator, model, optimizer, scheduler, dataset, train_loader, eval_loader,
        batch_size, progress, compile_seconds, Meter(accelerator.device, config.run.telemetry),
        Watch(accelerator, stop_request or StopRequest()), Journal(), ema, lock,
    )  # fmt: skip
    _introduce(job, threads, resuming, [*said, *stale, *damaged])
    return job


def cuda_graphs_serve(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Whether --compile may launch the model as a CUDA graph: one GPU, one forward pass per optimizer step."""
    return accelerator.device.type == "cuda" and accelerator.num_processes == config.optim.grad_accum == 1


def choose_attention(
    model: nn.Module, micro_batch: int, image_size: int, accelerator: Accelerator, measure: bool = True
) -> tuple[str, list[str]]:
    """Put the attention that is fastest here into `model`; returns its name and what was measured, in words.

    The first process decides for all: a run computes in one way. Where it is not to measure, it is always the same one.
    """
    found: list[Any] = [(plain_attention(model), [])]
    if accelerator.is_main_process and measure:
        with accelerator.autocast():
            found = [pick_attention(model, micro_batch, image_size, accelerator.device)]
    name, said = broadcast_object_list(found)[0]
    set_attention(model, name)
    return name, said


def check_buildable(config: TrainConfig) -> None:
    """Raise UserError where model or optimizer can't be built: before the data is fetched, not after."""
    model = build_model(replace(config.model, weights=None), image_size(config), num_classes=2)
    build_optimizer(model, config.optim)


def build_ema(model: nn.Module, config: TrainConfig, accelerator: Accelerator) -> ModelEmaV3 | None:
    """The moving average of `model`'s weights that `config` asks for; prepared, it is saved with the checkpoints.

    In the first steps it moves faster, so that the random weights are soon forgotten.
    """
    if config.optim.ema is None:
        return None
    if env.sharded():
        raise UserError("--ema needs whole weights, and FSDP shards them; leave it out, or take DDP: multi_gpu.yaml")
    ema = ModelEmaV3(model, config.optim.ema, use_warmup=True)
    if config.run.compile:
        compile_model(ema.module, graphed=cuda_graphs_serve(config, accelerator))
    return ema


def _open_folder(folder: RunFolder, config: TrainConfig, progress: TrainState, resuming: bool, log: Log) -> None:
    """Bring the folder to where the run starts from."""
    if resuming:
        folder.rewind(progress)
    else:
        folder.create(config)
    log.attach(folder.root / "train.log")


def _introduce(job: TrainSession, threads: str, resuming: bool, said: list[str]) -> None:
    config, accelerator, log = job.config, job.accelerator, job.log
    parameters = sum(p.numel() for p in job.bare_model.parameters())
    log.line(f"{config.model.model}: {parameters:,} parameters, attention {config.model.attention}")
    for line in said:
        log.line(line)
    if job.compile_seconds is not None:
        what = "the model" if config.run.compile else "the attention"
        log.line(f"first passes, in which {what} compiles: {job.compile_seconds:.1f} s")
    log.line(
        f"{job.dataset.name}: {len(job.dataset.train.labels):,} images to train on, "
        f"{len(job.dataset.test.labels):,} ({job.dataset.evaluated_on}) to evaluate on, "
        f"{len(job.dataset.classes)} classes"
    )
    log.line(
        f"{device_name(accelerator.device)}; world size {accelerator.num_processes}; "
        f"mixed precision {accelerator.mixed_precision}; {threads}"
    )
    if job.batch_size != config.run.batch_size:
        log.line(f"batch size {job.batch_size} instead of {config.run.batch_size}: there are no more training images")
    if resuming:
        log.line(f"resuming {job.folder.root} after epoch {job.progress.epoch}, step {job.progress.step}")
