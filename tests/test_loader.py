"""Batches: the same for every world size, every sample in its place."""

import pytest
import torch

from fastvit_train.config import DataConfig
from fastvit_train.data.images import ResidentImages
from fastvit_train.data.loader import EvalLoader, Place, Preprocess, TrainLoader, check_batch_size, fit_batch_size
from fastvit_train.errors import UserError

CPU = torch.device("cpu")
PREPROCESS = Preprocess((0.5,) * 3, (0.5,) * 3, 8, CPU)
COUNT = 53


def images() -> tuple[ResidentImages, torch.Tensor]:
    """Images whose every pixel is the sample's number, which is its label too."""
    labels = torch.arange(COUNT)
    pixels = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return ResidentImages(pixels, CPU), labels


def train_loader(rank: int = 0, world_size: int = 1, accum: int = 1, seed: int = 0) -> TrainLoader:
    config = DataConfig(crop="shift", shift=2, flip="random", cutout=2)
    return TrainLoader(*images(), config, PREPROCESS, 12, accum, seed, Place(CPU, rank, world_size))


@pytest.mark.parametrize(("world_size", "accum"), [(2, 1), (4, 1), (1, 3), (2, 2)])
def test_ranks_and_micro_batches_share_out_the_same_batches(world_size: int, accum: int) -> None:
    whole = list(train_loader().micro_batches(epoch=2))
    assert len(whole) == 4
    parts = [list(train_loader(rank, world_size, accum).micro_batches(epoch=2)) for rank in range(world_size)]
    for step, (pixels, labels) in enumerate(whole):
        micro = [part[step * accum + i] for i in range(accum) for part in parts]
        assert {len(own) for _, own in micro} == {12 // world_size // accum}
        got = torch.cat([own for _, own in micro])
        order = got.argsort()
        assert torch.equal(got[order], labels.sort().values)
        assert torch.equal(torch.cat([own for own, _ in micro])[order], pixels[labels.argsort()])


def test_an_epoch_shows_each_sample_at_most_once_and_each_epoch_shuffles_anew() -> None:
    loader = train_loader()
    first, second = (torch.cat([labels for _, labels in loader.micro_batches(epoch)]) for epoch in (0, 1))
    assert len(first) == 48 == len(first.unique())
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.cat([labels for _, labels in train_loader().micro_batches(0)]))
    assert not torch.equal(first, torch.cat([labels for _, labels in train_loader(seed=1).micro_batches(0)]))


def test_starting_in_the_middle_of_an_epoch_gives_the_rest_of_it() -> None:
    whole = list(train_loader(accum=2).micro_batches(1))
    rest = list(train_loader(accum=2).micro_batches(1, first_step=3))
    assert len(rest) == 2
    for (a, b), (c, d) in zip(whole[6:], rest, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 10, 1000])
def test_evaluation_sees_every_sample_exactly_once(world_size: int, batch_size: int) -> None:
    seen, shapes = [], set()
    for rank in range(world_size):
        loader = EvalLoader(*images(), PREPROCESS, batch_size, Place(CPU, rank, world_size))
        batches = list(loader)
        shapes.add((len(batches), *(len(labels) for _, labels, _ in batches)))
        seen += [labels[mask] for _, labels, mask in batches]
        assert all(((pixels[:, 0, 0, 0] + 1) * 127.5).round().long().equal(labels) for pixels, labels, _ in batches)
    assert torch.cat(seen).sort().values.equal(torch.arange(COUNT))
    assert len(shapes) == 1, "every rank must do the same number of equally large steps"


def test_batch_sizes_that_cannot_be_cut_say_which_world_sizes_can() -> None:
    check_batch_size(256, 8, 2)
    with pytest.raises(
        UserError, match=r"--batch-size 10 can't be cut evenly into 3 processes.* among 1, 2, 5, 10 processes"
    ):
        check_batch_size(10, 3, 1)
    assert fit_batch_size(256, 1000, 8, 2) == 256
    assert fit_batch_size(256, 53, 4, 1) == 52
    with pytest.raises(UserError, match="3 training images are too few"):
        fit_batch_size(256, 3, 4, 1)
