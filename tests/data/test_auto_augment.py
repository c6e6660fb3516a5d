"""TrivialAugment and RandAugment do to each image what torchvision does to it, in any batch."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandAugment, TrivialAugmentWide
from torchvision.transforms.autoaugment import _apply_op

from fastvit_train.data.augmentation import auto_augment
from fastvit_train.data.augmentation.auto_augment import NUM_BINS, OPERATIONS

SPACES = {"trivial": auto_augment.trivial_space, "rand": auto_augment.rand_space}


def torchvisions(image: Tensor, space: str, operation: int, bin: int, negative: bool) -> Tensor:
    """Return the image after one of torchvision's operations, with its own table of strengths."""
    table = (
        TrivialAugmentWide()._augmentation_space(NUM_BINS)
        if space == "trivial"
        else RandAugment()._augmentation_space(NUM_BINS, tuple(image.shape[-2:]))
    )
    name, (strengths, signed) = list(table.items())[operation]
    strength = float(strengths[bin]) if strengths.ndim else 0.0
    return _apply_op(image, name, -strength if signed and negative else strength, InterpolationMode.NEAREST, None)


def draw_images(count: int, size: tuple[int, int], channels: int = 3) -> Tensor:
    """Draw smooth images of different brightness and contrast, so that each operation changes them."""
    coarse = torch.randint(0, 256, (count, channels, 4, 4)).float()
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    low, high = torch.rand(2, count, 1, 1, 1).sort(0).values
    return (low * 255 + (high - low) * smooth).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("size", [(32, 32), (24, 18)], ids=["square", "tall"])
@pytest.mark.parametrize("space", ["trivial", "rand"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_torchvisions(name: str, space: str, size: tuple[int, int], seed: int) -> None:
    """A level may differ by 1 where a product is rounded; a pixel may come from its neighbour at exactly half way."""
    count = 40
    images = draw_images(count, size)
    bins, negative = torch.randint(NUM_BINS, (count,)), torch.rand(count) < 0.5
    operation = OPERATIONS.index(name)
    got = auto_augment.apply(images, torch.full((count,), operation), bins, negative, SPACES[space](*size))
    expected = torch.stack(
        [torchvisions(images[i], space, operation, int(bins[i]), bool(negative[i])) for i in range(count)]
    )
    assert got.dtype == torch.uint8
    different = (got.int() - expected.int()).abs() > 1
    assert different.float().mean() <= (0.01 if name in ("rotate", "shear_x", "shear_y") else 0)
    assert name == "identity" or not torch.equal(expected, images)


def test_images_of_a_batch_get_different_operations(seed: int) -> None:
    count = 200
    images = draw_images(count, (32, 32))
    operations, bins = torch.randint(len(OPERATIONS), (count,)), torch.randint(NUM_BINS, (count,))
    negative = torch.rand(count) < 0.5
    space = auto_augment.trivial_space(32, 32)
    together = auto_augment.apply(images, operations, bins, negative, space)
    for i in range(count):
        own = slice(i, i + 1)
        alone = auto_augment.apply(images[own], operations[own], bins[own], negative[own], space)
        assert torch.equal(alone[0], together[i]), OPERATIONS[operations[i]]


def test_one_channel_and_small_images_are_possible(seed: int) -> None:
    for channels, size in ((1, (28, 28)), (3, (2, 2)), (1, (1, 5))):
        images = torch.randint(0, 256, (28, channels, *size), dtype=torch.uint8)
        operations = torch.arange(28) % len(OPERATIONS)
        got = auto_augment.apply(
            images, operations, torch.full((28,), 20), operations > 6, auto_augment.rand_space(*size)
        )
        assert got.shape == images.shape
        assert torch.equal(got[operations == 0], images[operations == 0])
