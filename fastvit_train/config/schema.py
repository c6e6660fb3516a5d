"""Every setting of a training run: type, default, allowed range, help line and marks, each in one place.

Flags, YAML keys and keyword arguments share one flat namespace of names.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastvit_train.config.validation import (
    Channels,
    Color,
    Count,
    DatasetName,
    Deviations,
    FolderName,
    Fraction,
    ImageSide,
    ImageSize,
    LayerCount,
    Magnitude,
    Mark,
    Means,
    MlpRatio,
    NonNegative,
    NonNegativeInt,
    OperationCount,
    Positive,
    PositiveFraction,
    Precision,
    Seed,
    Text,
    UnitFraction,
    Width,
)


@dataclass(frozen=True)
class ModelConfig:
    """Model. Unset options take the model's own defaults."""

    model: Text = "mc_vit_4_4_32"
    """one of our models or any timm model name; with --pretrained also hf-hub:USER/MODEL or local-dir:FOLDER"""
    attention: Annotated[Text, Mark.MAY_CHANGE, Mark.NOT_A_DEPARTURE] = "auto"
    """naive, fused, sdpa, compiled, cpp, triton, or auto, which measures and takes the fastest"""
    block: Annotated[Literal["auto", "torch", "cpp", "triton"], Mark.MAY_CHANGE, Mark.NOT_A_DEPARTURE] = "auto"
    """cpp: one CPU kernel per block, triton: a GPU kernel for half of it, torch: operators, auto: cpp where it fits"""
    weights: Annotated[Text | None, Mark.MAY_CHANGE, Mark.PATH] = None
    """initialize from this .pth or .safetensors file; the compact family's and the upstream's layouts are converted"""
    pretrained: bool = False
    """start from the weights that the model was published with"""
    init_from: Annotated[Text | None, Mark.PATH] = None
    """start from the model and the weights of this finished run, also with other classes or another --image-size"""
    num_classes: Count | None = None
    """number of outputs; default: the number of classes of the data set"""
    image_size: Annotated[ImageSize, Mark.NOT_A_DEPARTURE] = None
    """side of the input in pixels, or HEIGHTxWIDTH such as 32x48; default: the model's native size"""
    in_chans: Channels | None = None
    """channels of the input: 3 for red, green and blue, or 1 for gray levels; default: the model's own"""
    mean: Means | None = None
    """mean of each channel of the images, for pixels from 0 to 1; default: the model's own"""
    std: Deviations | None = None
    """standard deviation of each channel; default: the model's own"""
    patch_size: ImageSide | None = None
    """side of a patch in pixels"""
    embed_dim: Width | None = None
    """width of a token (hidden size)"""
    depth: LayerCount | None = None
    """number of transformer blocks"""
    num_heads: LayerCount | None = None
    """number of attention heads; must divide embed_dim"""
    mlp_ratio: MlpRatio | None = None
    """width of the MLP divided by embed_dim"""
    qkv_bias: bool | None = None
    """add a bias to query, key and value"""
    pos_embed: Literal["learned", "sine", "conv"] | None = None
    """position embedding; conv adds a depthwise 3x3 convolution of the tokens before each block instead"""
    initializer_range: Positive | None = None
    """standard deviation of the initial weights"""
    patch_init: Literal["random", "whiten"] = "random"
    """whiten: initialize the patch projection with the principal directions of the training images' patches"""
    drop_rate: Fraction | None = None
    """dropout on embeddings and projections"""
    attn_drop_rate: Fraction | None = None
    """dropout on attention weights"""
    drop_path_rate: Fraction | None = None
    """stochastic depth rate of the last block"""


@dataclass(frozen=True)
class DataConfig:
    """Data and augmentation."""

    dataset: DatasetName = "digits"
    """such as cifar10; folder: DATA_DIR/train/CLASS/ and test/; shards: the .tar files in DATA_DIR; or hf:USER/NAME"""
    data_dir: Annotated[Text, Mark.MAY_CHANGE, Mark.PATH, Mark.NOT_A_DEPARTURE] = "data"
    """folder that holds the data sets and receives downloads"""
    data_url: Annotated[Text | None, Mark.MAY_CHANGE, Mark.NOT_A_DEPARTURE] = None
    """download from this mirror instead of the data set's own host"""
    holdout: Fraction = 0.0
    """evaluate on this fraction of the training images instead of on a test set; also reads DATA_DIR/CLASS/ alone"""
    holdout_seed: Seed = 0
    """seed that decides which images are held out; --seed does not change them"""
    background: Color = "white"
    """color that transparent parts of images are composed on: white, black, gray, or one such as #ffcc00"""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """bring image files to the input's shape: crop a side, pad the other with the background's color, or stretch it"""
    crop_pct: PositiveFraction | None = None
    """part of each side of the crop that --fit crop keeps; default: 1, with --pretrained the model's own"""
    stream: Annotated[Literal["auto", "always", "never"], Mark.MAY_CHANGE] = "auto"
    """decode the images of a folder again in every epoch; auto does so only if they do not fit in memory"""
    sampler: Literal["shuffle", "stratified", "balanced"] = "shuffle"
    """stratified: each class has its share of every batch; balanced: all classes equally, rare ones repeatedly"""
    crop: Literal["none", "shift", "resized"] = "none"
    """shift by whole pixels with reflected borders, or random resized crop"""
    shift: NonNegativeInt = 4
    """maximum shift in pixels"""
    crop_scale: PositiveFraction = 0.8
    """minimum area of a random resized crop, as a fraction of the image"""
    flip: Literal["none", "random", "alternating"] = "none"
    """horizontal flip; alternating flips each image in every other epoch"""
    cutout: NonNegativeInt = 0
    """side of the square that cutout blanks, in pixels"""
    auto_augment: Literal["none", "trivial", "rand"] = "none"
    """change each image by operations of random strength, as TrivialAugment or RandAugment do"""
    rand_ops: OperationCount = 2
    """RandAugment: number of operations per image"""
    rand_magnitude: Magnitude = 9
    """RandAugment: strength of the operations"""
    color_jitter: UnitFraction = 0.0
    """change brightness, contrast and saturation by up to this fraction"""
    random_erasing: UnitFraction = 0.0
    """probability that a rectangle of the image is erased"""
    mixup: NonNegative = 0.0
    """blend each image with another; the value is both parameters of the shares' beta distribution, such as 0.2"""
    cutmix: NonNegative = 0.0
    """paste a part of another image into each; the parameters are as with mixup, such as 1"""


@dataclass(frozen=True)
class OptimConfig:
    """Optimization."""

    optimizer: Text = "adamw"
    """any timm optimizer name; muon and nmuon train the blocks' matrices with Muon and the rest with AdamW"""
    lr: NonNegative = 1e-3
    """peak learning rate"""
    weight_decay: NonNegative = 0.01
    """weight decay"""
    decay_all: bool = False
    """apply weight decay to biases, norms and position embeddings too"""
    momentum: Fraction | None = None
    """momentum; default: the optimizer's own"""
    schedule: Literal["constant", "cosine", "linear", "tanh", "wsd"] = "cosine"
    """learning rate schedule, stepped after every optimizer step"""
    warmup: Fraction = 0.0
    """fraction of all steps over which the learning rate rises to its peak"""
    label_smoothing: Fraction = 0.0
    """probability mass spread over the other classes"""
    class_weights: Annotated[Text | None, Mark.PATH] = None
    """weights of the classes in the loss: auto for as much weight on each class, or a JSON file of weights by name"""
    layer_decay: PositiveFraction | None = None
    """train each layer with this fraction of the learning rate of the layer after it, such as 0.75"""
    freeze: NonNegativeInt = 0
    """do not train the first N layers: the first turns the image into tokens, and each block is one more"""
    clip_grad: NonNegative | None = None
    """maximum gradient norm"""
    ema: Fraction | None = None
    """evaluate and save an exponential moving average of the weights with this decay, such as 0.999"""
    grad_accum: Count = 1
    """number of micro-batches that each batch is split into"""


@dataclass(frozen=True)
class RunConfig:
    """Run."""

    recipe: Annotated[Text, Mark.MAY_CHANGE, Mark.NOT_A_DEPARTURE] = "quickstart"
    """named settings to start from; --config and flags override them"""
    exp_name: Annotated[FolderName | None, Mark.MAY_CHANGE, Mark.RUN_NAME, Mark.NOT_A_DEPARTURE] = None
    """name of the run's folder; default: RECIPE-DATA-MODEL-seedN, with -2 and so on if it is in use"""
    runs_dir: Annotated[Text, Mark.MAY_CHANGE, Mark.RUN_NAME, Mark.PATH, Mark.NOT_A_DEPARTURE] = "runs"
    """folder that holds the runs"""
    epochs: Count = 100
    """passes over the training set"""
    extend: Annotated[tuple[Count, ...], Mark.MAY_CHANGE] = ()
    """train a finished run for N more epochs, with the schedule again from its start; a second number does so again"""
    batch_size: Count = 256
    """images per optimizer step, over all processes"""
    eval_batch_size: Annotated[Count, Mark.MAY_CHANGE] = 1000
    """images per evaluation step and process"""
    seed: Seed = 0
    """seed of the initial weights, the sample order and the augmentation"""
    precision: Annotated[Precision | None, Mark.MAY_CHANGE, Mark.NOT_A_DEPARTURE] = None
    """mixed precision; default: what `accelerate launch` sets, which is `no` (fp32) without --mixed_precision"""
    compile: Annotated[bool, Mark.MAY_CHANGE] = False
    """use torch.compile, and on GPUs launch each step as a CUDA graph; the time for this is reported separately"""
    grad_checkpointing: Annotated[bool, Mark.MAY_CHANGE] = False
    """compute the activations of each block again in the backward pass instead of keeping them: less memory, slower"""
    fit_memory: Annotated[bool, Mark.MAY_CHANGE, Mark.NOT_A_DEPARTURE] = False
    """split each batch into as few micro-batches as fit in memory, found by trying; so does --batch-size auto"""
    deterministic: Annotated[bool, Mark.MAY_CHANGE] = False
    """compute the same bits in every run, on a GPU too; slower"""
    save_every: Annotated[NonNegativeInt, Mark.MAY_CHANGE] = 0
    """save a checkpoint every N optimizer steps, in addition to one after every epoch; 0: only after epochs"""
    keep: Annotated[Count, Mark.MAY_CHANGE] = 2
    """number of newest checkpoints to keep; the best one is kept too"""
    keep_best_of: Literal["accuracy", "balanced", "loss"] = "accuracy"
    """what decides which epoch is the best one: accuracy, balanced accuracy, or the lowest loss"""
    patience: Count | None = None
    """stop after N epochs without a better one, and end with the best epoch's weights"""
    average_last: Count | None = None
    """end with the average of the weights after the last N epochs"""
    on_save_error: Annotated[Literal["stop", "continue"], Mark.MAY_CHANGE] = "stop"
    """what to do if a checkpoint cannot be written, for example because the disk is full"""
    save_model_every: Annotated[NonNegativeInt, Mark.MAY_CHANGE] = 0
    """keep a copy of the weights every N epochs; 0: never"""
    target_accuracy: PositiveFraction | None = None
    """report the training and evaluation time until an evaluation first reaches this accuracy (0.75 for 75%)"""
    stop_after: Annotated[Count | None, Mark.MAY_CHANGE] = None
    """stop after this epoch; continue later with --resume"""
    track: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Mark.MAY_CHANGE, Mark.NOT_A_DEPARTURE] = ()
    """trackers to log to, in addition to the run's own files"""
    telemetry: Annotated[bool, Mark.MAY_CHANGE, Mark.NOT_A_DEPARTURE] = True
    """measure the GPU's energy and utilization; nothing is sent anywhere"""

    @property
    def cycles(self) -> tuple[int, ...]:
        """Epochs of the run without its extensions, and of each extension; the schedule begins again with each."""
        return (self.epochs, *self.extend)

    @property
    def total_epochs(self) -> int:
        """Epochs of the run with its extensions."""
        return sum(self.cycles)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run as the user wrote them; `models.resolve` makes a `ResolvedConfig` of them."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
