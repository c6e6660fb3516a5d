"""Mixup and CutMix: pixels and labels are shared in the same proportions."""

import pytest
import torch
from torch import Tensor

from fastvit_train.config.schema import DataConfig
from fastvit_train.data.augmentation.augment import Augment

CPU = torch.device("cpu")
COUNT, CLASSES, SIZE = 600, 5, 12


def mixed(seed: int, **settings: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mix images whose pixels are all their sample's index; returns samples, partners, images and labels."""
    augment = Augment(DataConfig(**settings), COUNT, seed, CPU)
    augment.start_epoch(2)
    samples = torch.randperm(COUNT)[: COUNT // 2]
    needed = augment.with_partners(samples)
    pixels = needed.float()[:, None, None, None].expand(-1, 3, SIZE, SIZE)
    images, labels = augment.mix(pixels, needed % CLASSES, needed, CLASSES)
    return samples, needed[len(samples) :], images, labels


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}], ids=str)
def test_labels_are_shared_as_the_pixels_are(seed: int, settings: dict[str, float]) -> None:
    samples, partners, images, labels = mixed(seed, **settings)
    for i in range(len(samples)):
        own, partner = int(samples[i]), int(partners[i])
        share = 1.0 if own == partner else float((images[i].mean() - partner) / (own - partner))
        expected = torch.zeros(CLASSES)
        expected[own % CLASSES] += share
        expected[partner % CLASSES] += 1 - share
        torch.testing.assert_close(labels[i], expected, atol=1e-3, rtol=0)


def test_mixup_blends_all_pixels_alike(seed: int) -> None:
    _, _, images, labels = mixed(seed, mixup=0.4)
    assert torch.equal(images, images[:, :1, :1, :1].expand_as(images))
    assert (labels.max(1).values < 0.99).sum() > 50, "nothing is blended"


def test_cutmix_pastes_one_rectangle(seed: int) -> None:
    samples, partners, images, _ = mixed(seed, cutmix=1.0)
    pasted = images[:, 0] != samples[:, None, None]
    assert torch.equal(images[:, 0][pasted], partners[:, None, None].expand_as(pasted)[pasted].float())
    rows, columns = pasted.any(2), pasted.any(1)
    assert torch.equal(pasted, rows[:, :, None] & columns[:, None, :]), (
        "not a product of an interval of rows and columns"
    )
    for edges in (rows, columns):
        assert (edges.int().diff(dim=1).abs().sum(1) <= 2).all(), "the rows or columns are not next to each other"
    assert 0.15 < pasted.float().mean() < 0.45  # the share is uniform, and a part of the rectangles is outside


def test_both_together_mix_about_half_of_the_images_by_each(seed: int) -> None:
    _, _, images, _ = mixed(seed, mixup=1.0, cutmix=1.0)
    blended = (images[:, 0] == images[:, :1, 0, 0, None]).flatten(1).all(1)
    assert 0.3 < blended.float().mean() < 0.75  # CutMix may paste nothing or everything


def test_each_sample_is_the_partner_of_one_and_every_epoch_pairs_anew(seed: int) -> None:
    augment = Augment(DataConfig(mixup=0.2), COUNT, seed, CPU)
    pairs = []
    for epoch in (0, 1, 0):
        augment.start_epoch(epoch)
        pairs.append(augment.with_partners(torch.arange(COUNT))[COUNT:])
    assert torch.equal(pairs[0].sort().values, torch.arange(COUNT))
    assert torch.equal(pairs[0], pairs[2]) and not torch.equal(pairs[0], pairs[1])


def test_shares_have_the_beta_distribution(seed: int) -> None:
    augment = Augment(DataConfig(mixup=0.3), 20_000, seed, CPU)
    augment.start_epoch(0)
    share = augment._draws["share"].double()
    assert share.mean().item() == pytest.approx(0.5, abs=0.02)
    assert share.var().item() == pytest.approx(1 / (4 * (2 * 0.3 + 1)), abs=0.01)  # of Beta(a, a)
