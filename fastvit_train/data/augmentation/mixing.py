"""Mixup and CutMix: which image each one is mixed with, and how much of each remains.

Sources: Zhang et al. 2017 (https://arxiv.org/abs/1710.09412); Yun et al. 2019 (https://arxiv.org/abs/1905.04899).

Shape suffixes: B batch, H height, W width, S samples of an epoch.
"""

import numpy as np
import torch
from torch import Tensor

from fastvit_train.data.augmentation.rectangles import interval_around, rectangle


def draw(mixup: float, cutmix: float, samples: int, stream: torch.Generator) -> dict[str, Tensor]:
    """Draw how each sample is mixed; if both are given, half of the samples by each.

    Args:
        mixup, cutmix: both parameters of the beta distribution of the sample's own share; 0 means never.
        samples: number of samples.
        stream: random numbers.

    Returns:
        "partner": the sample that each one is mixed with, int64 (samples,); each sample is the partner of one.
        "share": what remains of the sample, float32 (samples,).
        "is_cut": whether a part of the partner is pasted, by CutMix, instead of blended, bool (samples,).
        "center": the center of that part, as fractions of height and width, float32 (samples, 2).
    """
    partner_S = torch.randperm(samples, generator=stream)
    is_cut_S = torch.rand(samples, generator=stream) < (0.5 if mixup and cutmix else float(cutmix > 0))
    center_S2 = torch.rand(samples, 2, generator=stream)
    numbers = np.random.default_rng(int(torch.randint(2**62, (), generator=stream)))  # torch's beta takes no generator
    from_cutmix_S, from_mixup_S = (_draw_shares(alpha, samples, numbers) for alpha in (cutmix, mixup))
    share_S = torch.where(is_cut_S, from_cutmix_S, from_mixup_S)
    return {"partner": partner_S, "share": share_S, "is_cut": is_cut_S, "center": center_S2}


def _draw_shares(alpha: float, samples: int, numbers: np.random.Generator) -> Tensor:
    """Draw shares from Beta(alpha, alpha), float32 (samples,); they are 1 if alpha is 0."""
    return torch.tensor(numbers.beta(alpha, alpha, samples) if alpha else 1.0, dtype=torch.float32).expand(samples)


def pixel_weights(share_B: Tensor, is_cut_B: Tensor, center_B2: Tensor, size: torch.Size) -> Tensor:
    """Return the weight of the sample's own image in each pixel, float32 (batch, height, width).

    CutMix pastes a rectangle with the sides' ratio of the image. It may reach over the border, and then what remains of
    the sample is more than its share. The mean of the weights is what counts in the loss.
    """
    side_B = (1 - share_B).clamp(min=0).sqrt()
    rows_BH, columns_BW = (
        interval_around(center_B2[:, axis], length, (side_B * length).long()) for axis, length in enumerate(size)
    )
    pasted_BHW = rectangle(rows_BH, columns_BW)
    return torch.where(is_cut_B[:, None, None], (~pasted_BHW).float(), share_B[:, None, None])
