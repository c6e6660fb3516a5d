"""Data sets in the format of the Hugging Face Hub: by name, or a folder of parquet files."""

import functools
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvit_train.config.validation import HUGGING_FACE
from fastvit_train.data.decode import Row
from fastvit_train.data.sources.folder import TEST_NAMES, TRAIN_NAME, Listing
from fastvit_train.data.sources.hub import offline_if_unreachable
from fastvit_train.utils.errors import UserError, printable

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

IMAGE_NAMES, LABEL_NAMES = ("image", "img"), ("label", "labels", "fine_label", "class", "target")
"""the usual names of the columns, preferred first"""
UNLABELED = -1
"""the label of images whose class is kept secret"""


@dataclass(frozen=True)
class Columns:
    """Names of the columns with the images and the labels."""

    image: str
    label: str


def list_rows(dataset: str, holdout: bool) -> tuple[Listing, str]:
    """Find the images of a data set, downloading it if it is not in the cache.

    Args:
        dataset: `hf:NAME` or `hf:NAME:CONFIGURATION`, where NAME is USER/NAME on the Hub or a folder.
        holdout: part of the training set is held out, so that no test split is needed or read.

    Returns:
        The images, and a line about the columns and splits that were chosen.

    Raises:
        UserError: if it is not available, or if splits, images or labels are not found.
    """
    tables = _load(dataset)
    columns = _find_columns(dataset, tables)
    train_name, test_name = _find_splits(dataset, tables, columns, holdout)
    classes, labels = _read_labels(dataset, tables[train_name], columns.label)
    train = _rows(tables[train_name], columns.image, train_name), labels
    test: tuple[Sequence[Row], Tensor] = ([], torch.empty(0, dtype=torch.int64))
    if not holdout:
        _, test_labels = _read_labels(dataset, tables[test_name], columns.label, classes)
        test = _rows(tables[test_name], columns.image, test_name), test_labels
    used = [tables[train_name], *([] if holdout else [tables[test_name]])]
    files = [Path(file["filename"]) for table in used for file in table.cache_files]
    folder = Path(_split_name(dataset)[0])
    root = folder if folder.is_dir() else files[0].parent
    note = f"images from column {columns.image}, labels from column {columns.label}, training on split {train_name}"
    names = tuple(printable(name) for name in classes)
    evaluated_on = "holdout" if holdout else test_name
    return Listing(root, title(dataset), names, evaluated_on, train, test, Counter(), files), printable(note)


def count_classes(dataset: str) -> int:
    """Return the number of classes; arguments and errors are those of `list_rows`."""
    tables = _load(dataset)
    columns = _find_columns(dataset, tables)
    train_name, _ = _find_splits(dataset, tables, columns, holdout=True)
    return len(_read_labels(dataset, tables[train_name], columns.label)[0])


def title(dataset: str) -> str:
    """Return the name to print with every accuracy."""
    name, configuration = _split_name(dataset)
    name = Path(name).resolve().name if Path(name).is_dir() else name
    return printable(f"{name} ({configuration})" if configuration else name)


def _split_name(dataset: str) -> tuple[str, str | None]:
    name = dataset.removeprefix(HUGGING_FACE)
    if Path(name).is_dir():  # on Windows, a folder's name may hold a colon
        return name, None
    name, _, configuration = name.partition(":")
    return name, configuration or None


@functools.cache  # the classes are counted before the images are read
def _load(dataset: str) -> "DatasetDict":
    try:
        import datasets
    except ImportError:
        raise UserError(f"--dataset {dataset} needs datasets: pip install 'fastvit-train[hf]'") from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name, configuration = _split_name(dataset)
    try:
        if Path(name).is_dir():
            return datasets.load_dataset(name, configuration)
        with offline_if_unreachable():
            return datasets.load_dataset(name, configuration)
    except Exception as error:  # whatever the Hub's client, or the parser of one of many formats, raises
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        hint = f"; choose one as in {HUGGING_FACE}{name}:CONFIGURATION" if "onfig" in reason else ""
        raise UserError(f"--dataset {dataset} cannot be loaded: {reason}{hint}") from None


def _find_columns(dataset: str, tables: "DatasetDict") -> Columns:
    """Find the columns by their types, and by their names if several have the type."""
    from datasets import ClassLabel, Image, Value

    features: dict[str, Any] = next(iter(tables.values())).features
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    plain = [name for name, feature in features.items() if isinstance(feature, Value) and name in LABEL_NAMES]
    image, label = _preferred(images, IMAGE_NAMES), _preferred(labels or plain, LABEL_NAMES)
    if image is None or label is None:
        found = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        missing = "images" if image is None else "labels"
        raise UserError(
            f"--dataset {dataset} has no column of {missing}; its columns are {found}; it needs one of type Image, and "
            f"one of type ClassLabel or one named {', '.join(LABEL_NAMES[:-1])} or {LABEL_NAMES[-1]}"
        )
    return Columns(image, label)


def _preferred(names: Sequence[str], order: Sequence[str]) -> str | None:
    return next((name for name in order if name in names), names[0] if names else None)


def _find_splits(dataset: str, tables: "DatasetDict", columns: Columns, holdout: bool) -> tuple[str, str]:
    """Return the names of the training split and of the first test split that has labels."""
    names = list(tables)
    train = TRAIN_NAME if TRAIN_NAME in names else names[0]
    if holdout:
        return train, ""
    tests = [name for name in (*TEST_NAMES, "validation", "valid") if name in names]
    labeled = [name for name in tests if UNLABELED not in _values(tables[name], columns.label)]
    if train != TRAIN_NAME or not labeled:
        why = f"none of {', '.join(tests)} has labels" if tests else f"its splits are {', '.join(names)}"
        raise UserError(
            f"--dataset {dataset} has no split train, or none to evaluate on ({why}); --holdout 0.1 evaluates on some "
            "training images"
        )
    return train, labeled[0]


def _values(table: "Dataset", column: str) -> list[Any]:
    return list(table.select_columns([column])[:][column])


def _read_labels(
    dataset: str, table: "Dataset", column: str, classes: Sequence[str] | None = None
) -> tuple[Sequence[str], Tensor]:
    """Return the names of the classes and the labels, int64 (rows,); `classes` are those of the training split."""
    values, feature = _values(table, column), table.features[column]
    if names := getattr(feature, "names", None):
        return names, torch.tensor(values, dtype=torch.int64)
    if classes is None:
        classes = list(map(str, sorted(set(values))))
    index = {name: label for label, name in enumerate(classes)}
    if unknown := sorted(set(map(str, values)) - set(classes)):
        raise UserError(f"--dataset {dataset}: no training image has the label {unknown[0]!r}, but a test image has it")
    return classes, torch.tensor([index[str(value)] for value in values], dtype=torch.int64)


def _rows(table: "Dataset", column: str, split: str) -> list[Row]:
    from datasets import Image

    encoded = table.select_columns([column]).cast_column(column, Image(decode=False))
    return [Row(encoded, column, index, split) for index in range(len(encoded))]
