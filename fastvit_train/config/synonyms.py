"""What other trainers call our settings and verbs, and what to do where we have no such setting.

The names are those of timm's and torchvision's scripts, Hugging Face's Trainer, Lightning, Keras, Ultralytics, DeiT and
nanoGPT.
"""

from collections.abc import Iterable

from fastvit_train.utils.errors import nearest

FLAGS = {
    "lr": "learning-rate base-lr max-lr peak-lr initial-lr init-lr start-lr blr lr0 lr-base lr-max step-size",
    "weight-decay": "wd l2 l2-reg decay weight-decay-rate reg regularization",
    "batch-size": "b bs batch n-batch train-batch-size global-batch-size total-batch-size images-per-batch",
    "eval-batch-size": "validation-batch-size vb val-batch-size test-batch-size per-device-eval-batch-size",
    "epochs": "e ep num-epochs num-train-epochs max-epochs n-epochs nepochs nb-epochs total-epochs train-epochs",
    "optimizer": "opt optim optimiser optimizer-name",
    "schedule": "sched scheduler lr-scheduler lr-scheduler-type lr-schedule lr-policy lr-decay lr-decay-style",
    "momentum": "mom sgd-momentum beta1",
    "label-smoothing": "smoothing label-smoothing-factor label-smooth smooth",
    "clip-grad": "grad-clip gradient-clip max-grad-norm max-norm gradient-clip-val clip-grad-norm clip "
    "gradient-clipping",
    "grad-accum": "gradient-accumulation-steps gradient-accumulation grad-accum-steps accumulate-grad-batches "
    "accum-iter accum-steps accumulation-steps accumulate update-freq num-micro-batches",
    "grad-checkpointing": "gradient-checkpointing activation-checkpointing use-checkpoint checkpoint-activations",
    "fit-memory": "auto-find-batch-size auto-batch-size auto-scale-batch-size scale-batch-size autobatch",
    "compile": "torchcompile torch-compile use-compile jit torchscript",
    "image-size": "img-size input-size imgsz img resolution res crop-size train-crop-size image-res input-res size",
    "in-chans": "channels in-channels num-channels input-channels n-channels in-c ch nb-channels input-nc grayscale",
    "num-classes": "nb-classes n-classes nclasses classes nc num-labels n-labels output-dim out-dim num-outputs",
    "embed-dim": "dim hidden-size hidden-dim d-model n-embd embedding-dim emb-dim width encoder-embed-dim",
    "depth": "num-layers layers n-layer n-layers num-hidden-layers encoder-layers num-blocks n-blocks blocks",
    "num-heads": "heads n-head n-heads nhead num-attention-heads attention-heads",
    "patch-size": "patch p patches",
    "drop-rate": "dropout drop drop-prob dropout-rate hidden-dropout-prob emb-dropout",
    "attn-drop-rate": "attn-drop attention-dropout attention-drop-rate attn-dropout attention-probs-dropout-prob",
    "drop-path-rate": "drop-path droppath drop-connect stochastic-depth stochastic-depth-rate stochastic-depth-prob sd",
    "model": "arch a architecture model-name backbone net network model-type model-name-or-path",
    "attention": "attn attn-impl attn-implementation flash-attention flash-attn use-flash-attn fused-attn sdpa",
    "resume": "resume-from resume-from-checkpoint auto-resume continue continue-training restart",
    "exp-name": "name experiment experiment-name exp run-name run-id id tag comment",
    "runs-dir": "output output-dir log-dir logdir save-dir save-path out out-dir default-root-dir work-dir workdir "
    "results-dir checkpoint-dir ckpt-dir logs project model-dir",
    "data-dir": "data data-path data-root root dataset-dir dataset-path dataset-root dataroot train-dir "
    "train-data-dir imagenet-path path input-dir folder",
    "dataset": "dataset-name ds dset",
    "holdout": "val-split validation-split val-fraction val-size valid-size val-ratio test-size valid-pct",
    "crop-scale": "scale min-scale rrc-scale",
    "crop": "random-crop randomcrop random-resized-crop padding pad",
    "flip": "hflip horizontal-flip random-flip fliplr random-horizontal-flip",
    "cutout": "cutout-length",
    "random-erasing": "reprob re-prob random-erase erasing",
    "mixup": "mixup-alpha",
    "cutmix": "cutmix-alpha",
    "auto-augment": "aa randaugment rand-augment randaug trivialaugment",
    "class-weights": "class-weight",
    "sampler": "balanced-sampler weighted-sampler",
    "seed": "random-seed manual-seed rng-seed random-state torch-seed",
    "save-every": "save-steps save-interval checkpoint-every checkpoint-interval save-freq save-period save-frequency",
    "keep": "save-total-limit checkpoint-hist save-top-k keep-checkpoints max-to-keep",
    "config": "cfg yaml config-file conf settings c config-path",
    "deterministic": "cudnn-deterministic use-deterministic-algorithms reproducible",
    "dry-run": "fast-dev-run smoke-test sanity-check",
    "repeat": "num-seeds n-seeds trials num-trials n-runs num-runs repeats",
    "overwrite": "overwrite-output-dir force exist-ok f",
    "target-accuracy": "target-acc target stop-at-accuracy",
    "top": "k top-k topk",
    "to": "format export-format",
}
WITH_NOTES = {
    ("batch-size", "it counts the images of all processes together"): "per-device-train-batch-size per-gpu-batch-size "
    "per-gpu-train-batch-size batch-size-per-gpu micro-batch-size local-batch-size device-batch-size",
    ("warmup", "it is a fraction of all steps"): "warmup-epochs warmup-steps warmup-iters warmup-ratio warmup-lr "
    "lr-warmup-epochs lr-warmup-steps num-warmup-steps",
    ("pretrained", "it takes no value"): "from-pretrained use-pretrained imagenet-pretrained",
    ("init-from", "it takes the folder of a run"): "finetune fine-tune finetune-from start-from",
    (
        "weights",
        "it takes a file",
    ): "pretrained-weights pretrained-path initial-checkpoint init-checkpoint init-weights "
    "checkpoint ckpt ckpt-path load load-from load-checkpoint model-path start-checkpoint restore pretrain "
    "weights-path",
    ("ema", "it takes the decay, such as 0.999"): "model-ema ema-decay model-ema-decay use-ema with-ema",
    ("precision", "as in --precision bf16"): "amp use-amp native-amp apex-amp amp-dtype amp-impl fp16 bf16 half "
    "float16 bfloat16 mixed-precision dtype torch-dtype autocast fp32 mp",
    ("track", "as in --track wandb"): "wandb log-wandb use-wandb report-to logger tensorboard use-tensorboard tb "
    "log-with tracker trackers",
    (
        "stop-after",
        "it counts epochs",
    ): "max-steps max-iters total-steps num-steps iterations iters steps max-train-steps",
    ("patience", "it counts epochs without a better one"): "early-stopping early-stop early-stopping-patience",
    ("keep-best-of", "accuracy, balanced or loss"): "metric-for-best-model eval-metric best-metric monitor",
    ("average-last", "it counts epochs"): "swa checkpoint-averaging swa-epochs",
}
"""by the setting and what to know about it"""
ADVICE = {
    "images are kept in memory, or decoded by a thread per core: there is nothing to set": "workers num-workers nw j "
    "n-workers dataloader-num-workers loader-workers worker pin-mem pin-memory prefetch-factor persistent-workers "
    "preprocessing-num-workers num-threads threads",
    "the launch decides on the processes: accelerate launch --multi_gpu --num_processes N -m fastvit_train": "gpus gpu "
    "num-gpus n-gpus ngpu ngpus gpu-ids gpu-id devices num-devices nproc-per-node nproc num-processes world-size "
    "local-rank rank dist-url dist-backend nodes num-nodes nnodes distributed ddp strategy multi-gpu "
    "multiprocessing-distributed dp tpu-cores fsdp deepspeed",
    "the launch decides on the device: a GPU if there is one, or accelerate launch --cpu -m fastvit_train": "device "
    "cpu cuda no-cuda use-cuda use-cpu accelerator use-gpu mps",
    "the model has a mean and a standard deviation; --mean and --std set others": "norm-mean norm-std normalize",
    "allowed: --crop, --flip, --cutout, --auto-augment, --color-jitter, --random-erasing, --mixup, --cutmix": (
        "augment augmentation aug vflip ra-sampler repeated-aug"
    ),
    "the model is evaluated after every epoch": "eval-every val-interval eval-interval eval-steps evaluation-strategy "
    "eval-strategy check-val-every-n-epoch val-check-interval eval-freq validate-every val-every",
    "the losses of all steps are in steps.jsonl in the run's folder": "log-interval logging-steps print-freq log-every "
    "log-every-n-steps log-freq log-steps print-every",
}
"""names by what to do, where we have no such setting"""
VERBS = {
    "train": "fit run start finetune fine-tune pretrain",
    "eval": "evaluate test validate val score",
    "predict": "infer inference classify pred",
    "inspect": "visualize visualise show attention explain",
    "export": "convert save onnx",
    "push": "upload publish hub",
    "profile": "benchmark bench perf",
    "plan": "estimate scale scaling",
    "models": "list model list-models zoo",
    "recipes": "recipe list-recipes presets configs",
    "compare": "diff plot",
    "watch": "dashboard tensorboard monitor serve ui gui web live view",
}


def squeeze(name: str) -> str:
    """Return a name in the form in which names are compared: small letters without - and _."""
    return name.replace("-", "").replace("_", "").lower()


def _index() -> dict[str, tuple[str, str]]:
    """Return our name, if we have one, and a note by each other name."""
    table: dict[str, tuple[str, str]] = {}
    rows = [(ours, "", names) for ours, names in FLAGS.items()]
    rows += [(ours, note, names) for (ours, note), names in WITH_NOTES.items()]
    rows += [("", note, names) for note, names in ADVICE.items()]
    for ours, note, names in rows:
        table |= {squeeze(name): (squeeze(ours), note) for name in names.split()}
    return table


_FLAGS = _index()
_VERBS = {name: (ours, "") for ours, names in VERBS.items() for name in names.split()}


def suggestion(name: str, allowed: Iterable[str], most: int = 2, verbs: bool = False) -> str:
    """Return what to write in place of a name that is not allowed, as in "did you mean --lr?"; empty if unknown.

    Args:
        name: a flag, a setting or a verb.
        allowed: the names that are allowed, as they are to be written.
        most: how many names to suggest.
        verbs: the names are verbs.
    """
    allowed = list(allowed)
    spelling = {squeeze(other): other for other in allowed}
    ours, note = (_VERBS if verbs else _FLAGS).get(squeeze(name), ("", ""))
    if squeeze(name) in spelling:
        return f"did you mean {spelling[squeeze(name)]}?"
    if ours in spelling:
        return f"did you mean {spelling[ours]}?{f' ({note})' if note else ''}"
    if note and not ours:
        return note
    close = nearest(name, allowed, most)
    return f"did you mean {' or '.join(close)}?" if close else ""
