"""The input pipeline: augmented, normalised batches of 256, from our loader and from torchvision in a DataLoader."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torchvision import transforms

from bench.benchmark_case import BenchmarkCase, Workload, device
from bench.typical import HALF, Pictures, loader
from fastvit_train.config.resolved import InputSize
from fastvit_train.config.schema import DataConfig
from fastvit_train.data.images import ResidentImages
from fastvit_train.data.loader import Preprocess, RankInfo, TrainLoader

BATCH = 256
IMAGES = {"cpu": 4096, "cuda": 51200}
OPERATION = "input pipeline"


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Return uint8 images (count, 3, 32, 32), the same each time, and a different label for each."""
    draws = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draws), torch.arange(count)


def ours(count: int, crop: str = "resized") -> TrainLoader:
    images, labels = pictures(count)
    rank_info = RankInfo(device())
    config = DataConfig(crop=crop, flip="random" if crop != "none" else "none")  # type: ignore[arg-type]
    preprocess = Preprocess(HALF, HALF, InputSize(3, 32, 32), rank_info.device)
    return TrainLoader(
        ResidentImages(images, rank_info.device), labels, config, preprocess, min(BATCH, count), 1, 0, rank_info
    )


def build_ours(count: int) -> Workload:
    train_loader = ours(count)
    epoch = iter(range(10**9))

    def run() -> None:
        for _ in train_loader.micro_batches(next(epoch)):
            pass

    def check() -> None:
        plain = list(ours(count, crop="none").micro_batches(0))
        labels = torch.cat([labels for _, labels in plain])
        assert sorted(labels.tolist()) == list(range(count)), "an epoch does not contain every image once"
        expected = pictures(count)[0].to(device())[labels] / 255 * 2 - 1
        torch.testing.assert_close(torch.cat([images for images, _ in plain]), expected, atol=1e-5, rtol=0)
        augmented = torch.cat([images for images, _ in train_loader.micro_batches(0)])
        assert augmented.shape == expected.shape and augmented.abs().max() <= 1 + 1e-5
        assert not torch.equal(augmented, expected)

    return Workload(run, check, count)


def build_typical(count: int) -> Workload:
    images, labels = pictures(count)
    batches = loader(Pictures(images, labels), min(BATCH, count))

    def run() -> None:
        for batch, targets in batches:
            batch.to(device()), targets.to(device())

    def check() -> None:
        plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(HALF, HALF)])
        first, label = Pictures(images, labels, plain)[3]
        torch.testing.assert_close(first, images[3] / 255 * 2 - 1)
        assert label == 3
        assert sorted(int(label) for _, targets in batches for label in targets) == list(range(count))

    return Workload(run, check, count)


def cases() -> Iterator[BenchmarkCase]:
    count = IMAGES[device().type]
    for name, build in (("torchvision in a DataLoader", build_typical), ("fastvit_train", build_ours)):
        yield BenchmarkCase(
            OPERATION,
            f"{count} images of 3x32x32, batch {BATCH}",
            "fp32",
            name,
            count,
            build,
            main=True,
            quick_check=True,
        )


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_input(case: BenchmarkCase, measure: Callable[[BenchmarkCase], None]) -> None:
    measure(case)
