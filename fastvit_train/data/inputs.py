"""A run's data set and the loaders of its batches."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from fastvit_train.config.resolved import ResolvedConfig
from fastvit_train.config.schema import DataConfig
from fastvit_train.data.datasets import DatasetSpec, Split, check_labels, load_dataset
from fastvit_train.data.images import Images, ResidentImages, StreamedImages
from fastvit_train.data.loader import EvalLoader, Preprocess, RankInfo, TrainLoader
from fastvit_train.distributed import sync


def load_data(config: ResolvedConfig, accelerator: Accelerator, imitate: bool = False) -> DatasetSpec:
    """Load the data set on all ranks; the first rank of each machine downloads, examines and decodes it.

    Args:
        config: the run's configuration.
        accelerator: the ranks.
        imitate: as in `load_dataset`.

    Raises:
        UserError: if the data set is not available, or if a label is outside the model's classes.
    """

    def load(data: DataConfig, examine_streamed: bool) -> DatasetSpec:
        dataset = load_dataset(data, config.input_size, examine_streamed, imitate)
        labels = torch.cat((dataset.train.labels, dataset.test.labels))
        check_labels(labels, config.num_classes, dataset.name)
        return dataset

    is_first = accelerator.is_local_main_process
    first = sync.run_on_all_ranks(accelerator, lambda: load(config.data, True) if is_first else None)
    # Ranks find different amounts of free memory, but all must stream or none: the training step differs.
    streams = sync.first_of_ranks(True if first and _is_streamed(first) else None) is not None
    same = replace(config.data, stream="always" if streams else "never")
    done = first if first and _is_streamed(first) == streams else None
    return sync.run_on_all_ranks(accelerator, lambda: done or load(same, is_first))


def _is_streamed(dataset: DatasetSpec) -> bool:
    return not isinstance(dataset.train.images, Tensor)


def build_train_loader(
    config: ResolvedConfig, dataset: DatasetSpec, batch_size: int, rank_info: RankInfo
) -> TrainLoader:
    """Build the loader of the training set.

    Args:
        config: the run's configuration.
        dataset: the run's data set.
        batch_size: images per optimizer step, over all ranks.
        rank_info: rank, world size and device of this process.
    """
    return TrainLoader(
        _open(dataset.train, config, rank_info),
        dataset.train.labels,
        config.data,
        build_preprocess(config, rank_info.device),
        batch_size,
        config.optim.grad_accum,
        config.run.seed,
        rank_info,
        config.num_classes,
    )


def build_eval_loader(config: ResolvedConfig, dataset: DatasetSpec, rank_info: RankInfo) -> EvalLoader:
    """Build the loader of the split that the run is evaluated on."""
    return EvalLoader(
        _open(dataset.test, config, rank_info),
        dataset.test.labels,
        build_preprocess(config, rank_info.device),
        config.run.eval_batch_size,
        rank_info,
    )


def build_preprocess(config: ResolvedConfig, device: torch.device) -> Preprocess:
    """Build the preprocessing that turns uint8 images into the model's input on `device`."""
    return Preprocess(config.mean, config.std, config.input_size, device)


def _open(split: Split, config: ResolvedConfig, rank_info: RankInfo) -> Images:
    if isinstance(split.images, Tensor):
        return ResidentImages(split.images, rank_info.device)
    return StreamedImages(split.images, config.input_size, rank_info.device)
