"""Data sets as the Hugging Face Hub has them: a parquet file per split, with the types of the columns."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGE = {"_type": "Image"}
NAMED = {"_type": "ClassLabel", "names": ["cat", "dog"]}
NUMBER, TEXT = {"_type": "Value", "dtype": "int64"}, {"_type": "Value", "dtype": "string"}


def png(sample: int) -> bytes:
    """Encode an image of 24 x 20 pixels: noise, brighter in red or blue by turns."""
    pixels = np.random.default_rng(sample).integers(0, 100, (20, 24, 3), dtype=np.uint8)
    pixels[..., 2 * (sample % 2)] += 120
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


Columns = dict[str, tuple[dict[str, Any], list[Any]]]
"""by the name of a column, its type as the Hub describes it, and its values"""


def write_split(root: Path, split: str, columns: Columns) -> None:
    """Write a split as the Hub has them: parquet files whose schema holds the types of the columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {name: feature for name, (feature, _) in columns.items()}
    table = pa.table({name: pa.array(values) for name, (_, values) in columns.items()})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (root / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")


def images(count: int, first: int = 0) -> tuple[dict[str, Any], list[Any]]:
    return IMAGE, [{"bytes": png(first + i), "path": f"{first + i}.png"} for i in range(count)]


def alternating(count: int) -> list[int]:
    return [i % 2 for i in range(count)]


def write(root: Path, image: str = "image", label: str = "label", test: str = "test") -> Path:
    write_split(root, "train", {image: images(40), label: (NAMED, alternating(40))})
    write_split(root, test, {image: images(10, 100), label: (NAMED, alternating(10))})
    return root
