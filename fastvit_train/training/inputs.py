"""A run's data and models' inputs: what is loaded, and the batches made of it."""

import torch
from accelerate import Accelerator
from torch import nn

from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.datasets import DatasetSpec, Split, check_labels, load_dataset
from fastvit_train.data.images import Images, ResidentImages, StreamedImages
from fastvit_train.data.loader import EvalLoader, Place, Preprocess, TrainLoader
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
    config: TrainConfig, dataset: DatasetSpec, model: nn.Module, batch_size: int, place: Place
) -> TrainLoader:
    """Batches of the training set as `model` takes them."""
    return TrainLoader(
        _open(dataset.train, config, place),
        dataset.train.labels,
        config.data,
        _preprocess(config, model, place),
        batch_size,
        config.optim.grad_accum,
        config.run.seed,
        place,
    )


def build_eval_loader(config: TrainConfig, dataset: DatasetSpec, model: nn.Module, place: Place) -> EvalLoader:
    """Batches of the test set as `model` takes them."""
    return EvalLoader(
        _open(dataset.test, config, place),
        dataset.test.labels,
        _preprocess(config, model, place),
        config.run.eval_batch_size,
        place,
    )


def _open(split: Split, config: TrainConfig, place: Place) -> Images:
    if isinstance(split.images, torch.Tensor):
        return ResidentImages(split.images, place.device)
    return StreamedImages(split.images, image_size(config), place.device)


def _preprocess(config: TrainConfig, model: nn.Module, place: Place) -> Preprocess:
    cfg = pretrained_cfg(model)
    return Preprocess(cfg["mean"], cfg["std"], image_size(config), place.device)


def whiten(model: nn.Module, config: TrainConfig, dataset: DatasetSpec) -> None:
    """Whiten the patches of `model` by the first of the training images, the same on every process.

    Raises:
        UserError: where the images are streamed, or the model cuts no patches.
    """
    images = dataset.train.images
    if not isinstance(images, torch.Tensor):
        raise UserError("--patch-init whiten needs the images in memory; give --patch-init random, or --stream never")
    here = Place(torch.device("cpu"), rank=0, world_size=1)
    whiten_patches(model, _preprocess(config, model, here)(images[:SAMPLES]))
