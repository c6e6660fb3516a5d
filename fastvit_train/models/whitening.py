"""Patch whitening: the patch projection starts as the principal directions of the training patches, evenly scaled.

Source: whitening of the first layer, Coates & Ng 2012, as in Jordan's airbench (https://arxiv.org/abs/2404.00498);
here the projection is trained further.

Shape suffixes: B images, C channels, H height, W width, P values of a patch, S patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_train.config.resolved import ResolvedConfig
from fastvit_train.data.datasets import DatasetSpec
from fastvit_train.data.inputs import build_preprocess
from fastvit_train.models.vit import PatchTokenizer
from fastvit_train.utils.errors import UserError

MAX_SAMPLES = 5000
"""maximum number of images that the directions are computed from"""
STD = 0.3
"""standard deviation of a token's channels over all patches; below 1, so that the blocks' outputs soon matter"""
FLOOR = 0.01
"""fraction of the mean variance that is added to each direction's variance, so that noise is not amplified"""


def whiten(model: nn.Module, config: ResolvedConfig, dataset: DatasetSpec) -> None:
    """Whiten the patches of `model` with training images of all classes, which are the same on every rank.

    Raises:
        UserError: if the images are streamed, or if the model does not project patches.
    """
    images = dataset.train.images
    if not isinstance(images, Tensor):
        raise UserError("--patch-init whiten needs the images in memory; give --patch-init random, or --stream never")
    # Folders are read one class after another, so the first images would be of one class.
    samples = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:MAX_SAMPLES]
    whiten_patches(model, build_preprocess(config, torch.device("cpu"))(images[samples]))


def whiten_patches(model: nn.Module, images_BCHW: Tensor) -> None:
    """Set the patch projection of `model` to whiten the patches of `images_BCHW`, normalized as in training.

    The channels take the directions in order of decreasing variance. If there are more channels than directions, the
    remaining ones keep their random weights.

    Raises:
        UserError: if the model does not project patches.
    """
    tokenizer = getattr(model, "patch_embed", None)
    projection = getattr(tokenizer, "proj", None)
    if not isinstance(projection, nn.Conv2d) or not isinstance(tokenizer, PatchTokenizer):
        raise UserError("--patch-init whiten needs one of our models with a patch projection; give --patch-init random")
    patches_SP = F.unfold(images_BCHW.double(), projection.kernel_size, stride=projection.stride)
    patches_SP = patches_SP.transpose(1, 2).flatten(0, 1)
    mean_P = patches_SP.mean(0)
    covariance_PP = torch.cov(patches_SP.T)
    variances_P, directions_PP = torch.linalg.eigh(covariance_PP)
    scales_P = STD / (variances_P + FLOOR * variances_P.mean()).sqrt()
    filters_PP = (directions_PP * scales_P).T.flip(0)
    signs_P = filters_PP.gather(1, filters_PP.abs().argmax(1, keepdim=True)).sign()  # eigh does not determine them
    filters_PP = (filters_PP * signs_P)[: projection.out_channels]
    with torch.no_grad():
        projection.weight[: len(filters_PP)] = filters_PP.view(-1, *projection.weight.shape[1:]).to(projection.weight)
        if projection.bias is not None:
            projection.bias[: len(filters_PP)] = -(filters_PP @ mean_P).to(projection.bias)
