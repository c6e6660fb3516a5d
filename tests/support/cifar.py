"""Small files in the layout of CIFAR-10 and CIFAR-100, taken for the published ones."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets.utils import calculate_md5

from fastvit_train.data.sources.published import CIFAR10, CIFAR100


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch, per_batch: int = 20, labels: int = 10) -> Path:
    """Write random batches in torchvision's layout, and have their MD5 taken for the published ones.

    Returns `root`.
    """
    folder = root / CIFAR10.unpacked_name
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = generator.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        batch = {"data": data, "labels": [i % labels for i in range(per_batch)], "filenames": ["x.png"] * per_batch}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    accept_cifar(CIFAR10, folder, monkeypatch)
    return root


def accept_cifar(cls: type[CIFAR10] | type[CIFAR100], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the MD5 of the files in `folder`, those there are, taken for the published ones."""

    def accepted(name: str, md5: str) -> list[str]:
        return [name, calculate_md5(folder / name) if (folder / name).is_file() else md5]

    monkeypatch.setattr(cls, "train_list", [accepted(*entry) for entry in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [accepted(*entry) for entry in cls.test_list])
    name = cls.meta["filename"]
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": accepted(name, cls.meta["md5"])[1]})
