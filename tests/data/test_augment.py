"""Augmentation gives torchvision's result for each sample, in any batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, functional

from fastvit_train.config.schema import DataConfig
from fastvit_train.data.augmentation.augment import Augment
from fastvit_train.data.augmentation.crops import crop_boxes, resized_crop, shift
from fastvit_train.data.loader import Preprocess
from tests.support import rgb

CPU = torch.device("cpu")


def draw_images(count: int, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8)


@pytest.mark.parametrize("size", [(32, 32), (28, 20)])
def test_shift_is_a_crop_out_of_the_reflected_border(seed: int, size: tuple[int, int]) -> None:
    images = draw_images(40, size)
    down, right = torch.randint(-4, 5, (2, 40))
    flip = torch.rand(40) < 0.5
    for i, got in enumerate(shift(images, down, right, flip)):
        padded = F.pad(images[i].float()[None], (4, 4, 4, 4), mode="reflect")[0]
        top, left = 4 + int(down[i]), 4 + int(right[i])
        window = padded[:, top : top + size[0], left : left + size[1]]
        expected = window.flip(-1) if flip[i] else window
        assert torch.equal(got.float(), expected)


def test_resized_crop_is_torchvisions(seed: int) -> None:
    images = draw_images(50)
    boxes = crop_boxes(torch.rand(50, 20), torch.rand(50, 2), images.shape[-2:], 0.3)
    flip = torch.rand(50) < 0.5
    for i, got in enumerate(resized_crop(images, *boxes, flip)):
        top, left, height, width = (int(edge[i]) for edge in boxes)
        expected = functional.resized_crop(images[i].float(), top, left, height, width, [32, 32], antialias=False)
        expected = expected.flip(-1) if flip[i] else expected
        assert torch.allclose(got, expected, atol=1e-3)


@pytest.mark.slow
def test_crop_boxes_are_distributed_as_torchvisions(seed: int) -> None:
    count = 20_000
    boxes = torch.stack(crop_boxes(torch.rand(count, 20), torch.rand(count, 2), torch.Size((32, 32)), 0.8), 1)
    template = torch.zeros(3, 32, 32)
    theirs = [RandomResizedCrop.get_params(template, [0.8, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    expected = torch.tensor(theirs)
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 32 and (boxes[:, 1] + boxes[:, 3]).max() <= 32
    # Five standard errors of a mean of `count` integers whose standard deviation is about 1.5.
    assert (boxes.double().mean(0) - expected.double().mean(0)).abs().max() < 5 * 2**0.5 * 1.5 / count**0.5
    assert (boxes.double().std(0) - expected.double().std(0)).abs().max() < 0.1


ALL = DataConfig(crop="shift", shift=4, flip="random", cutout=8)


@pytest.mark.parametrize(
    "config", [ALL, DataConfig(crop="resized", flip="alternating", cutout=5)], ids=["shift", "resized"]
)
def test_a_samples_augmentation_depends_neither_on_its_batch_nor_on_its_position(seed: int, config: DataConfig) -> None:
    images = draw_images(30)
    augment = Augment(config, num_samples=30, seed=3, device=CPU)
    augment.start_epoch(5)
    samples = torch.randperm(30)

    def both(samples: Tensor) -> Tensor:
        return augment.erase(augment.crop_and_flip(images[samples], samples).float(), samples)

    together = both(samples)
    apart = torch.cat([both(part) for part in samples.split(7)])
    assert torch.allclose(together, apart, atol=1e-4)
    augment.start_epoch(6)
    assert not torch.allclose(together, both(samples), atol=1e-4), "every epoch draws anew"
    augment.start_epoch(5)
    assert torch.equal(together, both(samples)), "the same epoch draws the same"


def test_alternating_flip_shows_each_image_both_ways_in_any_two_epochs(seed: int) -> None:
    images = draw_images(200)
    augment = Augment(DataConfig(flip="alternating"), num_samples=200, seed=1, device=CPU)
    samples = torch.arange(200)
    flipped = []
    for epoch in range(4):
        augment.start_epoch(epoch)
        flipped.append((augment.crop_and_flip(images, samples) != images).flatten(1).any(1))
    assert 60 < int(flipped[0].sum()) < 140
    assert torch.equal(flipped[0], ~flipped[1]) and torch.equal(flipped[0], flipped[2])


def test_random_flip_flips_half(seed: int) -> None:
    images = draw_images(1000)
    augment = Augment(DataConfig(flip="random"), num_samples=1000, seed=seed, device=CPU)
    augment.start_epoch(0)
    flipped = (augment.crop_and_flip(images, torch.arange(1000)) != images).flatten(1).any(1)
    assert 400 < int(flipped.sum()) < 600


def test_shifts_reach_every_offset_equally(seed: int) -> None:
    count = 9000
    positions = torch.arange(32, dtype=torch.uint8).view(1, 1, 1, 32).expand(count, 3, 32, 32)
    augment = Augment(DataConfig(crop="shift", shift=1), num_samples=count, seed=seed, device=CPU)
    augment.start_epoch(0)
    centre = augment.crop_and_flip(positions, torch.arange(count))[:, 0, 16, 16].long()
    assert ((centre - 15).bincount(minlength=3) - count / 3).abs().max() < 5 * (count * 2 / 9) ** 0.5


def test_cutout_blanks_one_square(seed: int) -> None:
    augment = Augment(DataConfig(cutout=8), num_samples=100, seed=seed, device=CPU)
    augment.start_epoch(0)
    blanked = augment.erase(torch.ones(100, 3, 32, 32), torch.arange(100)) == 0
    areas = blanked[:, 0].flatten(1).sum(1)
    assert int(areas.max()) == 64 and int(areas.min()) >= 16
    assert torch.equal(blanked[:, 0], blanked[:, 2])


def test_preprocessing_is_torchvisions(seed: int) -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    images = draw_images(3)
    got = Preprocess(mean, std, rgb(32), CPU)(images)
    assert torch.allclose(got, functional.normalize(images.float() / 255, list(mean), list(std)), atol=1e-5)
    assert Preprocess(mean, std, rgb(64), CPU)(images).shape == (3, 3, 64, 64)
