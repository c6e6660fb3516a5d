"""Batches: the same for every world size, every sample in its position."""

import random

import pytest
import torch

from fastvit_train.config.schema import DataConfig
from fastvit_train.data.images import ResidentImages
from fastvit_train.data.loader import EvalLoader, Preprocess, RankInfo, TrainLoader, check_batch_size, fit_batch_size
from fastvit_train.utils.errors import UserError
from tests.support import rgb

CPU = torch.device("cpu")
PREPROCESS = Preprocess((0.5,) * 3, (0.5,) * 3, rgb(8), CPU)
COUNT = 53


def images() -> tuple[ResidentImages, torch.Tensor]:
    """Images in which every pixel is the sample's index, which is also its label."""
    labels = torch.arange(COUNT)
    pixels = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return ResidentImages(pixels, CPU), labels


def train_loader(
    rank: int = 0, world_size: int = 1, accum: int = 1, seed: int = 0, batch_size: int = 12, **settings: object
) -> TrainLoader:
    config = DataConfig(**{"crop": "shift", "shift": 2, "flip": "random", "cutout": 2, **settings})
    rank_info = RankInfo(CPU, rank, world_size)
    return TrainLoader(*images(), config, PREPROCESS, batch_size, accum, seed, rank_info, num_classes=COUNT)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@pytest.mark.slow
@pytest.mark.parametrize("crop", ["none", "shift", "resized"])
def test_all_ranks_together_get_the_batch_of_a_single_process(crop: str, seed: int) -> None:
    """Row for row, with the same augmentation, for any world size and number of micro-batches."""
    draw = random.Random(seed)
    for _ in range(10):
        batch_size = draw.choice([12, 16, 24])
        accum = draw.choice(divisors(batch_size))
        world_size = draw.choice(divisors(batch_size // accum))
        settings = {"seed": draw.randrange(100), "batch_size": batch_size, "crop": crop, "cutout": draw.choice([0, 3])}
        settings["flip"] = draw.choice(["none", "random", "alternating"])
        settings["auto_augment"] = draw.choice(["none", "trivial", "rand"])
        settings |= {name: draw.choice([0, 0.5]) for name in ("color_jitter", "random_erasing", "mixup", "cutmix")}
        settings["sampler"] = draw.choice(["shuffle", "stratified", "balanced"])
        epoch, first_step = draw.randrange(5), draw.randrange(COUNT // batch_size)
        print(world_size, accum, settings, epoch, first_step)
        whole = list(train_loader(**settings).micro_batches(epoch, first_step))
        parts = [
            list(train_loader(rank, world_size, accum, **settings).micro_batches(epoch, first_step))
            for rank in range(world_size)
        ]
        assert {len(part) for part in parts} == {len(whole) * accum}
        for step, (pixels, labels) in enumerate(whole):
            for i in range(accum):
                rows = slice(i * batch_size // accum, (i + 1) * batch_size // accum)
                for rank, part in enumerate(parts):
                    own_pixels, own_labels = part[step * accum + i]
                    assert torch.equal(own_labels, labels[rows][rank::world_size])
                    assert torch.equal(own_pixels, pixels[rows][rank::world_size])


def test_an_epoch_shows_each_sample_at_most_once_and_each_epoch_shuffles_anew() -> None:
    loader = train_loader()
    first, second = (torch.cat([labels for _, labels in loader.micro_batches(epoch)]) for epoch in (0, 1))
    assert len(first) == 48 == len(first.unique())
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.cat([labels for _, labels in train_loader().micro_batches(0)]))
    assert not torch.equal(first, torch.cat([labels for _, labels in train_loader(seed=1).micro_batches(0)]))


def test_balanced_sampling_repeats_rare_classes_with_another_augmentation_each_time(seed: int) -> None:
    labels = torch.tensor([0] * 40 + [1] * 8)
    pixels = torch.randint(0, 256, (48, 3, 8, 8), dtype=torch.uint8)
    config = DataConfig(sampler="balanced", crop="shift", shift=3)
    loader = TrainLoader(ResidentImages(pixels, CPU), labels, config, PREPROCESS, 12, 1, seed, RankInfo(CPU))
    batches = list(loader.micro_batches(0))
    shown, classes = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    assert classes.bincount().tolist() == [24, 24]
    assert len(shown[classes == 1].flatten(1).unique(dim=0)) > 15, "copies of an image are augmented alike"
    assert torch.equal(labels[loader.sample_order(0).flatten()], classes), "the named images are not those shown"
    samples = loader.start_epoch(0)[:, 0]
    selected = [loader.batch(row) for row in samples]  # as a CUDA graph selects them
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(batches, selected, strict=True))


def test_stratified_batches_have_each_classs_share_on_all_ranks_together(seed: int) -> None:
    labels = torch.arange(4).repeat_interleave(60)
    pixels = torch.randint(0, 256, (240, 3, 8, 8), dtype=torch.uint8)
    config = DataConfig(sampler="stratified")
    whole, *parts = (
        [own for _, own in TrainLoader(
            ResidentImages(pixels, CPU), labels, config, PREPROCESS, 24, 1, seed, RankInfo(CPU, rank, world_size)
        ).micro_batches(0)]
        for rank, world_size in ((0, 1), (0, 2), (1, 2))
    )  # fmt: skip
    for batch, *halves in zip(whole, *parts, strict=True):
        assert batch.bincount().tolist() == [6, 6, 6, 6]
        assert torch.equal(torch.stack(halves, 1).flatten(), batch)


def test_starting_in_the_middle_of_an_epoch_gives_the_rest_of_it() -> None:
    whole = list(train_loader(accum=2).micro_batches(1))
    rest = list(train_loader(accum=2).micro_batches(1, first_step=3))
    assert len(rest) == 2
    for (a, b), (c, d) in zip(whole[6:], rest, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_evaluation_sees_every_sample_exactly_once(seed: int) -> None:
    """For any world size, even if the last batch does not divide evenly."""
    draw = random.Random(seed)
    pixels, labels = images()
    drawn = [(draw.randint(1, 60), draw.randint(1, 60)) for _ in range(5)]
    for world_size, batch_size in [(1, 1000), (2, 27), (7, 1), *drawn]:
        print(world_size, batch_size)
        seen, shapes = [], set()
        for rank in range(world_size):
            batches = list(EvalLoader(pixels, labels, PREPROCESS, batch_size, RankInfo(CPU, rank, world_size)))
            shapes.add((len(batches), *(len(own) for _, own, _ in batches)))
            seen += [indices for _, _, indices in batches]
            for own, number, indices in batches:
                assert ((own[:, 0, 0, 0] + 1) * 127.5).round().long().equal(number)
                assert number.equal(indices.clamp(max=COUNT - 1)), "padding has the indices after the last sample's"
        assert torch.cat(seen).sort().values[:COUNT].equal(torch.arange(COUNT))
        assert len(shapes) == 1, "every rank must get the same number of batches of the same size"


def test_a_batch_size_that_does_not_divide_lists_the_world_sizes_that_do() -> None:
    check_batch_size(256, 8, 2)
    with pytest.raises(
        UserError, match=r"--batch-size 10 is not a multiple of 3 processes.* allowed with --grad-accum 1: 1, 2, 5, 10$"
    ):
        check_batch_size(10, 3, 1)
    assert fit_batch_size(256, 1000, 8, 2) == 256
    assert fit_batch_size(256, 53, 4, 1) == 52
    with pytest.raises(UserError, match=r"too few training images \(3\)"):
        fit_batch_size(256, 3, 4, 1)
