"""The baseline: a training script as it is typically written, for the same model and images as our trainer.

It loops over the heads, runs eager float32 with torch's operators, applies torchvision transforms to PIL images in a
DataLoader with two workers, uses AdamW, and calls `.item()` on the loss and accuracy of every step. Its workers persist
from epoch to epoch, which is faster than the default.
"""

from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import fastvit_train  # noqa: F401  registers the model with timm
from fastvit_kernels import GELULinear
from fastvit_train.utils.torch_private import TorchDispatchMode

HALF = (0.5, 0.5, 0.5)
WORKERS = 2
TRANSFORM = transforms.Compose(
    [
        transforms.ToTensor(),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.RandomResizedCrop((32, 32), scale=(0.8, 1.0), ratio=(0.75, 1.3333333333333333), antialias=True),
        transforms.Normalize(HALF, HALF),
    ]
)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Return uint8 images (count, 3, height, width) and labels one at a time, as torchvision's CIFAR10 does."""

    def __init__(self, images: Tensor, labels: Tensor, transform: transforms.Compose = TRANSFORM) -> None:
        self.images: np.ndarray = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def loader(pictures: Pictures, batch_size: int) -> DataLoader[tuple[Tensor, int]]:
    """Make shuffled batches; an incomplete last batch is dropped, as in our trainer."""
    return DataLoader(
        pictures,
        batch_size,
        shuffle=True,
        num_workers=WORKERS,
        drop_last=True,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )


class PlainGELULinear(nn.Linear):
    """A `GELULinear` that is computed by torch's operators, as in a typical script."""

    def __init__(self, layer: GELULinear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.approximate = layer.approximate

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.gelu(x, approximate=self.approximate))


class RefuseOurOperators(TorchDispatchMode):
    """Raise AssertionError if an operator of `fastvit_kernels` runs within this context, forward or backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace != "fastvit_kernels", f"{func} ran in the typical script, which uses torch's operators"
        return func(*args, **(kwargs or {}))


class Script:
    """The script's state: model, optimizer and loader."""

    def __init__(self, model: str, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.loader = loader(Pictures(images, labels), batch_size)
        self.model = timm.create_model(model, attention="naive").to(self.device)
        for parent in list(self.model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, GELULinear):
                    setattr(parent, name, PlainGELULinear(layer).to(self.device))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.01)

    def check(self) -> None:
        """Raise AssertionError if a training step runs an operator of `fastvit_kernels`; the weights do not change."""
        images = torch.zeros(2, 3, 32, 32, device=self.device)
        with RefuseOurOperators():
            self.model.train()(images).sum().backward()
        self.optimizer.zero_grad()

    def epoch(self) -> tuple[float, int]:
        """Train for one epoch; return the mean loss and the number of images."""
        self.model.train()
        total_loss, total_correct, seen = 0.0, 0.0, 0
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            self.optimizer.step()
            total_loss += loss.item() * len(images)
            total_correct += (logits.argmax(1) == labels).sum().item()
            seen += len(images)
        return total_loss / seen, seen
