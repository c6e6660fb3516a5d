"""The training configuration: frozen, library-free, one flat name space for flags and YAML keys alike."""

import types
import unicodedata
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastvit_train.utils.errors import UserError, did_you_mean, nearest

DatasetName = Literal["digits", "cifar10", "cifar100", "fashion-mnist", "folder", "synthetic"]


@dataclass(frozen=True)
class ModelConfig:
    """Model; what is not set is the model's own default."""

    model: str = "mc_vit_4_4_32"
    """a model of ours or any of timm's names"""
    attention: str = "auto"
    """naive, fused, sdpa, compiled, cpp, triton, or auto, which takes the fastest here; same weights under each"""
    weights: str | None = None
    """start from this .pth or .safetensors file; the compact family's and the seed's layouts are understood"""
    num_classes: int | None = None
    """outputs; the data set's classes by default"""
    image_size: int | None = None
    """side of the square input, pixels; the model's own by default"""
    patch_size: int | None = None
    """side of a patch, pixels"""
    embed_dim: int | None = None
    """width of a token (hidden size)"""
    depth: int | None = None
    """transformer blocks"""
    num_heads: int | None = None
    """attention heads; must divide embed_dim"""
    mlp_ratio: float | None = None
    """width of the MLP over embed_dim"""
    qkv_bias: bool | None = None
    """bias on query, key and value"""
    pos_embed: Literal["learned", "sine"] | None = None
    """position embedding"""
    initializer_range: float | None = None
    """standard deviation of the initial weights"""
    patch_init: Literal["random", "whiten"] = "random"
    """whiten: the patch projection starts as the directions in which the training images vary"""
    drop_rate: float | None = None
    """dropout on embeddings and projections"""
    attn_drop_rate: float | None = None
    """dropout on attention weights"""
    drop_path_rate: float | None = None
    """stochastic depth at the last block"""


@dataclass(frozen=True)
class DataConfig:
    """Data and augmentation."""

    dataset: DatasetName = "digits"
    """digits ships with the package; folder reads DATA_DIR/train and DATA_DIR/test (or val), a folder per class"""
    data_dir: str = "data"
    """where data sets lie, and where downloads go"""
    data_url: str | None = None
    """download from this mirror instead of the data set's own host"""
    holdout: float = 0.0
    """evaluate on this fraction of the training set, held out of it, instead of on the test set (for tuning)"""
    stream: Literal["auto", "always", "never"] = "auto"
    """decode a folder's images anew every epoch; auto does where they don't fit in memory"""
    crop: Literal["none", "shift", "resized"] = "none"
    """shift by whole pixels with reflected borders, or random resized crop"""
    shift: int = 4
    """largest shift, pixels"""
    crop_scale: float = 0.8
    """smallest area of a random resized crop"""
    flip: Literal["none", "random", "alternating"] = "none"
    """horizontal flip; alternating shows each image flipped in every other epoch"""
    cutout: int = 0
    """side of the square that is blanked, pixels"""


@dataclass(frozen=True)
class OptimConfig:
    """Optimization."""

    optimizer: str = "adamw"
    """any of timm's names; muon and nmuon take the blocks' matrices, AdamW the rest"""
    lr: float = 1e-3
    """peak learning rate"""
    weight_decay: float = 0.01
    """weight decay"""
    decay_all: bool = False
    """decay biases, norms and positions too"""
    momentum: float | None = None
    """momentum; the optimizer's own by default"""
    schedule: Literal["constant", "cosine", "linear", "tanh", "wsd"] = "cosine"
    """learning-rate schedule, by optimizer step"""
    warmup: float = 0.0
    """fraction of all steps over which the learning rate rises to its peak"""
    label_smoothing: float = 0.0
    """probability mass spread over the other classes"""
    clip_grad: float | None = None
    """largest gradient norm"""
    ema: float | None = None
    """evaluate and write a moving average of the weights with this decay (0.999); None: the weights themselves"""
    grad_accum: int = 1
    """micro-batches that one batch is split into"""


@dataclass(frozen=True)
class RunConfig:
    """Run."""

    recipe: str = "quickstart"
    """named settings to start from; --config and flags override them"""
    exp_name: str | None = None
    """name of the run's folder; DATASET-MODEL-seedN by default"""
    runs_dir: str = "runs"
    """where runs are kept"""
    epochs: int = 100
    """passes over the training set"""
    batch_size: int = 256
    """images per optimizer step, over all processes"""
    eval_batch_size: int = 1000
    """images per evaluation step and process"""
    seed: int = 0
    """of the weights, the order and the augmentation"""
    compile: bool = False
    """torch.compile the model; what compiling takes is reported apart"""
    deterministic: bool = False
    """same bits on every run, on a GPU too; slower"""
    save_every: int = 0
    """checkpoint every so many optimizer steps, besides at every epoch's end"""
    keep: int = 2
    """checkpoints to keep: the newest so many, and the best"""
    on_save_error: Literal["stop", "continue"] = "stop"
    """what to do where the disk is full; the checkpoints before are whole in either case"""
    save_model_every: int = 0
    """keep a copy of the weights every so many epochs"""
    target_accuracy: float | None = None
    """tell when an evaluation first reaches this accuracy (0.75 for 75%), on a clock that evaluation is inside of"""
    stop_after: int | None = None
    """stop after this epoch; go on later with --resume"""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """trackers to log to besides the run's own files"""
    telemetry: bool = True
    """measure the GPU's energy and utilisation; sent nowhere"""


@dataclass(frozen=True)
class TrainConfig:
    """All that determines a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


# What may change between a run and its resumption.
NOT_COMPARED = frozenset(
    {"recipe", "exp_name", "runs_dir", "data_dir", "data_url", "stream", "weights", "attention", "compile"}
    | {"eval_batch_size", "save_every", "save_model_every", "stop_after", "track", "telemetry", "keep", "on_save_error"}
    | {"deterministic"}
)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """All settings under their own names, as in config.yaml and on the command line."""
    return {key: value for section in asdict(config).values() for key, value in section.items()}


def override(config: TrainConfig, settings: dict[str, Any], source: str) -> TrainConfig:
    """`config` with `settings` (flat) replaced.

    Raises:
        UserError: for an unknown key or a value of the wrong type, naming `source`.
    """
    given, settings = settings, {key.replace("-", "_"): value for key, value in settings.items()}
    if len(settings) < len(given):
        raise UserError(f"{source} has a key twice, once with - and once with _; leave one out")
    known = flatten(config)
    for key in settings:
        if key not in known:
            close = nearest(key, known)
            hint = f"did you mean {' or '.join(close)}?" if close else f"allowed: {', '.join(known)}"
            raise UserError(f"unknown key {key!r} in {source}; {hint}")
    sections = {}
    for section in fields(config):
        part = getattr(config, section.name)
        hints = get_type_hints(type(part))
        own = {k: _checked(k, v, hints[k], source) for k, v in settings.items() if k in hints}
        sections[section.name] = replace(part, **own)
    return replace(config, **sections)


def _checked(key: str, value: Any, hint: Any, source: str) -> Any:
    """`value` as the type `hint`; numbers may be written as strings (YAML 1.1 reads 1e-3 as one)."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _checked(key, value, next(option for option in options if option is not type(None)), source)
    if origin is Literal:
        if value in options:
            return value
        names = [str(option) for option in options]
        hint = did_you_mean(str(value), names)
        raise UserError(f"{key}: {value!r} in {source} is not allowed{hint}; allowed: {', '.join(names)}")
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_checked(key, item, options[0], source) for item in value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if hint is float or number.is_integer():
                return hint(number)
        except (TypeError, ValueError):
            pass
    raise UserError(f"{key}: {value!r} in {source} is not of type {getattr(hint, '__name__', hint)}")


def validate(config: TrainConfig) -> None:
    """Raise UserError for the first setting that is out of its range."""
    run, data, optim, model = config.run, config.data, config.optim, config.model
    at_least_one: dict[str, tuple[int | None, int]] = {
        "epochs": (run.epochs, 10**6),
        "batch_size": (run.batch_size, 10**6),
        "eval_batch_size": (run.eval_batch_size, 10**6),
        "grad_accum": (optim.grad_accum, 10**6),
        "stop_after": (run.stop_after, 10**6),
        "keep": (run.keep, 10**6),
        "num_classes": (model.num_classes, 10**6),
        "image_size": (model.image_size, 2**12),
        "patch_size": (model.patch_size, 2**12),
        "embed_dim": (model.embed_dim, 10**5),
        "depth": (model.depth, 10**3),
        "num_heads": (model.num_heads, 10**3),
    }
    not_negative: dict[str, float | None] = {
        "save_every": run.save_every,
        "save_model_every": run.save_model_every,
        "shift": data.shift,
        "cutout": data.cutout,
        "lr": optim.lr,
        "weight_decay": optim.weight_decay,
        "clip_grad": optim.clip_grad,
        "initializer_range": model.initializer_range,
    }
    below_one: dict[str, float | None] = {
        "holdout": data.holdout,
        "warmup": optim.warmup,
        "ema": optim.ema,
        "momentum": optim.momentum,
        "label_smoothing": optim.label_smoothing,
        "drop_rate": model.drop_rate,
        "attn_drop_rate": model.attn_drop_rate,
        "drop_path_rate": model.drop_path_rate,
    }
    for key, (count, most) in at_least_one.items():
        _require(count is None or 1 <= count <= most, key, count, f"1 or more, up to {most:,}")
    for key, size in not_negative.items():
        _require(size is None or 0 <= size <= 1e9, key, size, "0 or more, up to 1e9")
    for key, share in below_one.items():
        _require(share is None or 0 <= share < 1, key, share, "from 0 up to, not including, 1")
    _require(0 <= run.seed < 2**31, "seed", run.seed, "0 to 2147483647")
    target = run.target_accuracy
    _require(target is None or 0 < target <= 1, "target_accuracy", target, "above 0, at most 1 (0.75 for 75%)")
    _require(model.mlp_ratio is None or 0 < model.mlp_ratio < 1000, "mlp_ratio", model.mlp_ratio, "above 0, below 1000")
    if model.patch_init == "whiten" and model.weights is not None:
        what = f"--patch-init whiten would overwrite what --weights {model.weights} brings"
        raise UserError(f"{what}; give --patch-init random")
    _require(0 < data.crop_scale <= 1, "crop_scale", data.crop_scale, "above 0, at most 1")
    name = "run" if run.exp_name is None else run.exp_name
    if Path(name).name != name or name in (".", "..", "") or len(name.encode(errors="replace")) > 200:
        raise UserError(f"--exp-name {name!r} must be a plain folder name of up to 200 letters; --runs-dir takes paths")
    for key, text in flatten(config).items():
        plain = not isinstance(text, str) or _is_plain(text)
        _require(plain, key, repr(text), "text on one line, up to 1,000 bytes, 250 of them between two slashes")


def _is_plain(text: str) -> bool:
    """Whether it can stand in a path and in a terminal: no control characters, no undecodable bytes, not too long."""
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text):
        return False
    return len(text.encode()) <= 1000 and all(len(part.encode()) <= 250 for part in text.split("/"))


def _require(holds: bool, key: str, value: Any, allowed: str) -> None:
    if not holds:
        raise UserError(f"--{key.replace('_', '-')} {value} is out of range; allowed: {allowed}")


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What differs between two flat configurations and matters to a resumed run, as `key: saved -> current`."""
    keys = [key for key in {**saved, **current} if key not in NOT_COMPARED]
    return [f"{k}: {saved.get(k)} -> {current.get(k)}" for k in keys if saved.get(k) != current.get(k)]
