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
from fastvit_train.data.encoded import Row
from fastvit_train.data.sources.folder import LONG_TEST_NAMES, TRAIN_NAME, Listing
from fastvit_train.data.sources.hub import offline_if_unreachable
from fastvit_train.utils.errors import UserError, counted, printable

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
    test_name, test_values = ("", []) if holdout else _read_test_split(dataset, tables, columns.label)
    train_name = _train_split(tables)
    train_values = _values(tables[train_name], columns.label)
    classes = _class_names(dataset, tables[train_name], columns.label, train_values)

    def read_split(name: str, values: list[Any]) -> tuple[Sequence[Row], Tensor]:
        labels = _to_labels(dataset, tables[name], columns.label, values, classes)
        return _rows(tables[name], columns.image, name), labels

    train = read_split(train_name, train_values)
    test = ([], torch.empty(0, dtype=torch.int64)) if holdout else read_split(test_name, test_values)
    used = [tables[train_name], *([] if holdout else [tables[test_name]])]
    files = [Path(file["filename"]) for table in used for file in table.cache_files]
    folder = Path(_split_name(dataset)[0])
    root = folder if folder.is_dir() else files[0].parent
    note = f"images from column {columns.image}, labels from column {columns.label}, training on split {train_name}"
    names = tuple(printable(name) for name in classes)
    evaluated_on = "holdout" if holdout else test_name
    return Listing(root, _title(dataset), names, evaluated_on, train, test, Counter(), files), printable(note)


def count_classes(dataset: str) -> int:
    """Return the number of classes; arguments and errors are those of `list_rows`."""
    tables = _load(dataset)
    columns = _find_columns(dataset, tables)
    table = tables[_train_split(tables)]
    return len(_class_names(dataset, table, columns.label, _values(table, columns.label)))


def _title(dataset: str) -> str:
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
    reachable = True
    try:
        if Path(name).is_dir():
            return datasets.load_dataset(name, configuration)
        with offline_if_unreachable() as reachable:
            return datasets.load_dataset(name, configuration)
    except Exception as error:  # whatever the Hub's client, or the parser of one of many formats, raises
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        hint = f"; choose one as in {HUGGING_FACE}{name}:CONFIGURATION" if "onfig" in reason else ""
        if not reachable:
            hint += f"; check the network (HF_ENDPOINT names a mirror), or give {HUGGING_FACE}FOLDER with a copy"
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


def _train_split(tables: "DatasetDict") -> str:
    return TRAIN_NAME if TRAIN_NAME in tables else next(iter(tables))


def _read_test_split(dataset: str, tables: "DatasetDict", column: str) -> tuple[str, list[Any]]:
    """Return the name of the first test split that has labels, and the values of its column of labels."""
    tests = [name for name in LONG_TEST_NAMES if name in tables]
    for name in tests if TRAIN_NAME in tables else ():
        values = _values(tables[name], column)
        if not any(value in (UNLABELED, None) for value in values):
            return name, values
    why = f"none of {', '.join(tests)} has a label for every image" if tests else f"its splits are {', '.join(tables)}"
    raise UserError(
        f"--dataset {dataset} has no split train, or none to evaluate on ({why}); --holdout 0.1 evaluates on some "
        "training images"
    )


def _values(table: "Dataset", column: str) -> list[Any]:
    return list(table.select_columns([column])[:][column])


def _class_names(dataset: str, table: "Dataset", column: str, values: list[Any]) -> list[str]:
    """Return the names of the classes: those that the type of the column lists, or all values of the column."""
    if unlabeled := values.count(None):
        raise UserError(
            f"--dataset {dataset}: {counted(unlabeled, 'training image')} without a label in {column}; remove it"
        )
    names = getattr(table.features[column], "names", None)
    return list(names) if names else list(map(str, sorted(set(values))))


def _to_labels(dataset: str, table: "Dataset", column: str, values: list[Any], classes: Sequence[str]) -> Tensor:
    """Return the labels that the values of a column stand for, int64 (rows,)."""
    if getattr(table.features[column], "names", None):
        return torch.tensor(values, dtype=torch.int64)
    index = {name: label for label, name in enumerate(classes)}
    if unknown := sorted(set(map(str, values)) - set(classes)):
        raise UserError(f"--dataset {dataset}: no training image has the label {unknown[0]!r}, but a test image has it")
    return torch.tensor([index[str(value)] for value in values], dtype=torch.int64)


def _rows(table: "Dataset", column: str, split: str) -> list[Row]:
    from datasets import Image

    encoded = table.select_columns([column]).cast_column(column, Image(decode=False))
    return [Row(encoded, column, index, split) for index in range(len(encoded))]
