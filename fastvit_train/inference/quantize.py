"""ONNX programs with 8-bit weights: `export --to onnx --quantize int8`."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastvit_train.config.resolved import InputSize
from fastvit_train.data.datasets import Split

PRODUCTS = ["MatMul", "Gemm"]
"""the operators that are quantized; nearly all weights of a transformer are in them"""
BATCH_SIZE = 256


def quantize_program(program: Path, path: Path) -> None:
    """Write the ONNX `program` to `path` with 8-bit weights, one scale per output of a layer.

    Activations are converted to 8 bits when they are multiplied, with one scale for the whole batch (dynamic
    quantization), so that no images are needed to calibrate it.

    Raises:
        Exception: anything, if onnxruntime cannot quantize the program.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it recommends a tool to prepare programs, which its user can't follow here
    try:
        quantize_dynamic(program, path, op_types_to_quantize=PRODUCTS, per_channel=True, weight_type=QuantType.QInt8)
    finally:
        logging.disable(level)


def accuracy(logits: Callable[[Tensor], Tensor], split: Split, input_size: InputSize) -> float:
    """Return the share of images that a program classifies correctly, from 0 to 1.

    Args:
        logits: takes uint8 images, (batch, *input_size); returns logits, (batch, classes).
        split: the images and their labels.
        input_size: channels, height and width of the program's input.
    """
    correct = 0
    for samples in torch.arange(len(split.labels)).split(BATCH_SIZE):
        predicted = logits(split.resized_pixels(samples, input_size)).argmax(1)
        correct += int((predicted == split.labels[samples]).sum())
    return correct / len(split.labels)


def add_metadata(path: Path, measured: dict[str, object]) -> None:
    """Add what was measured to the metadata of the program at `path`, as JSON under "measured"."""
    import onnx

    model = onnx.load(path)
    before = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**before, "measured": json.dumps(measured)})
    onnx.save(model, path)
