"""Random erasing has the distribution of torchvision's."""

import pytest
import torch
from torchvision.transforms import RandomErasing

from fastvit_train.data.augmentation.erasing import DRAWS, random_erasing


def erased_boxes(count: int, probability: float, size: tuple[int, int]) -> torch.Tensor:
    """Return top, left, height and width of what is erased, one row for each erased image, float64."""
    blank = random_erasing(torch.ones(count, 3, *size), torch.rand(count, DRAWS), probability) == 0
    assert torch.equal(blank[:, 0], blank[:, 2])
    rows, columns = blank[:, 0].any(2), blank[:, 0].any(1)
    assert torch.equal(blank[:, 0], rows[:, :, None] & columns[:, None, :])
    edges = [rows.int().argmax(1), columns.int().argmax(1), rows.sum(1), columns.sum(1)]
    return torch.stack(edges, 1)[rows.any(1)].double()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
def test_rectangles_are_distributed_as_torchvisions(seed: int, size: tuple[int, int]) -> None:
    count = 20_000
    boxes, template = erased_boxes(count, 1.0, size), torch.ones(3, *size)
    theirs = [RandomErasing.get_params(template, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(count)]
    expected = torch.tensor([box for box in theirs if box[2] < size[0]]).double()  # whole images: no try has fitted
    assert abs(len(boxes) - len(expected)) < 0.02 * count
    error = 5 * 2**0.5 * expected.std(0) / count**0.5
    assert ((boxes.mean(0) - expected.mean(0)).abs() < error).all()
    assert ((boxes.std(0) / expected.std(0) - 1).abs() < 0.05).all()


def test_the_probability_is_that_of_an_image(seed: int) -> None:
    assert len(erased_boxes(4000, 0.25, (32, 32))) / 4000 == pytest.approx(0.25, abs=0.04)
    assert len(erased_boxes(100, 0.0, (32, 32))) == 0
