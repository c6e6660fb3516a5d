"""Color jitter changes each image as torchvision's functions do, by factors of its own."""

import pytest
import torch
from torchvision.transforms import functional

from fastvit_train.data.augmentation import color


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_changed_as_by_torchvision(seed: int, channels: int) -> None:
    images, draws, strength = torch.rand(30, channels, 16, 16), torch.rand(30, 3), 0.7
    got = color.jitter(images * 255, draws, strength) / 255
    for image, draw, result in zip(images, draws, got, strict=True):
        brightness, contrast, saturation = (1 + strength * (2 * float(number) - 1) for number in draw)
        expected = functional.adjust_contrast(functional.adjust_brightness(image, brightness), contrast)
        expected = functional.adjust_saturation(expected, saturation)
        torch.testing.assert_close(result, expected, atol=2e-4, rtol=0)


def test_no_strength_changes_nothing_and_the_factors_reach_both_ends(seed: int) -> None:
    images = torch.rand(500, 3, 4, 4) * 100
    torch.testing.assert_close(color.jitter(images, torch.rand(500, 3), 0.0), images)
    gray = torch.full((2, 3, 4, 4), 100.0)  # neither contrast nor saturation changes it
    got = color.jitter(gray, torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.5, 0.5]]), 0.4)[:, 0, 0, 0]
    torch.testing.assert_close(got, torch.tensor([60.0, 140.0]))
