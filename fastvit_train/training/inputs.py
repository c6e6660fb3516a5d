"""A run's data and models' inputs: what is loaded, and the batches made of it."""

import torch
from accelerate import Accelerator
from torch import nn

from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.datasets import DatasetSpec, Split, check_labels, load_dataset
from fastvit_train.data.images import Images, ResidentImages, StreamedImages
from fastvit_train.data.loader import EvalLoader, Preprocess, RankInfo, TrainLoader
from fastvit_train.distributed import sync
from fastvit_train.models import native_image_size, pretrained_cfg, whiten_patches
from fastvit_train.models.whitening import SAMPLES
from fastvit_train.utils.errors import UserError


def load_data(config: TrainConfig, accelerator: Accelerator) -> DatasetSpec:
    """The data set of a resolved configuration; each machine's first process downloads and decodes for the others.

    Raises:
        UserError: where it can't be had, or has labels that the model has no output for.
    """

    def load() -> DatasetSpec:
        dataset = load_dataset(config.data, image_size(config))
        labels = torch.cat((dataset.train.labels, dataset.test.labels))
        check_labels(labels, num_classes(config, dataset), f"{dataset.name}, for a model of this --num-classes,")
        return dataset

    is_first = accelerator.is_local_main_process
    first = sync.run_on_all_ranks(accelerator, lambda: load() if is_first else None)
    return first or load()


def image_size(config: TrainConfig) -> int:
    """Side of the model's input, pixels."""
    return config.model.image_size or native_image_size(config.model.model)


def num_classes(config: TrainConfig, dataset: DatasetSpec) -> int:
    """The model's outputs."""
    return config.model.num_classes or len(dataset.classes)


def build_train_loader(
    config: TrainConfig, dataset: DatasetSpec, model: nn.Module, batch_size: int, rank_info: RankInfo
) -> TrainLoader:
    """Batches of the training set as `model` takes them."""
    return TrainLoader(
        _open(dataset.train, config, rank_info),
        dataset.train.labels,
        config.data,
        _preprocess(config, model, rank_info),
        batch_size,
        config.optim.grad_accum,
        config.run.seed,
        rank_info,
    )


def build_eval_loader(config: TrainConfig, dataset: DatasetSpec, model: nn.Module, rank_info: RankInfo) -> EvalLoader:
    """Batches of the test set as `model` takes them."""
    return EvalLoader(
        _open(dataset.test, config, rank_info),
        dataset.test.labels,
        _preprocess(config, model, rank_info),
        config.run.eval_batch_size,
        rank_info,
    )


def _open(split: Split, config: TrainConfig, rank_info: RankInfo) -> Images:
    if isinstance(split.images, torch.Tensor):
        return ResidentImages(split.images, rank_info.device)
    return StreamedImages(split.images, image_size(config), rank_info.device)


def _preprocess(config: TrainConfig, model: nn.Module, rank_info: RankInfo) -> Preprocess:
    cfg = pretrained_cfg(model)
    return Preprocess(cfg["mean"], cfg["std"], image_size(config), rank_info.device)


def whiten(model: nn.Module, config: TrainConfig, dataset: DatasetSpec) -> None:
    """Whiten the patches of `model` by the first of the training images, the same on every process.

    Raises:
        UserError: where the images are streamed, or the model cuts no patches.
    """
    images = dataset.train.images
    if not isinstance(images, torch.Tensor):
        raise UserError("--patch-init whiten needs the images in memory; give --patch-init random, or --stream never")
    on_cpu = RankInfo(torch.device("cpu"))
    whiten_patches(model, _preprocess(config, model, on_cpu)(images[:SAMPLES]))
