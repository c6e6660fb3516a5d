"""Export trained models: the verb `export`.

Each exported file is loaded again and compared with the model before it is put in place.
"""

import importlib.util
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import get_model_args
from torch import Tensor, nn

from fastvit_train import __version__
from fastvit_train.config.resolved import InputSize
from fastvit_train.config.schema import DataConfig
from fastvit_train.config.timm_config import imports, write_timm_config
from fastvit_train.data.datasets import load_dataset
from fastvit_train.data.loader import Preprocess
from fastvit_train.inference.quantize import accuracy, add_metadata, quantize_program
from fastvit_train.inference.trained_model import FOLDER, TrainedModel, load_run, non_finite_error
from fastvit_train.models import pretrained_cfg
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError, counted, printable

TOLERANCE = 1e-4
"""maximum absolute difference of a logit"""
MAX_IMAGES, BATCH_SIZE = 256, 64
METADATA = "metadata.json"
LogitsFunction = Callable[[Tensor], Tensor]
"""takes uint8 images, (batch, channels, height, width); returns logits, (batch, classes)"""


@dataclass(frozen=True)
class Format:
    """An export format: how a model is written and loaded again."""

    name: str
    """default name of the file or folder"""
    write: Callable[[TrainedModel, Path], None]
    load: Callable[[Path], LogitsFunction]
    needs: tuple[str, ...] = ()
    """packages that it needs, from the extra `export`"""


def export_run(
    run: str, to: str, output: Path | None, checkpoint: str | None = None, quantize: str | None = None
) -> Path:
    """Export a trained model and print how far the exported model's logits are from the model's.

    Args:
        run: as in `load_run`; the model runs on the CPU.
        to: one of `FORMATS`. onnx and torch-export contain the normalization and take uint8 images; safetensors and
            timm contain the weights, the architecture and the preprocessing.
        output: the file or folder to write; by default in export/ in the run's folder.
        checkpoint: as in `load_run`.
        quantize: "int8" for 8-bit weights, with onnx only; the accuracy of both programs is measured, printed and
            recorded in the file's metadata.

    Returns:
        The file or folder.

    Raises:
        UserError: if the model is not available, if it cannot be exported to that format, if a logit of the exported
            model, before it is quantized, differs by more than `TOLERANCE`, or if the data set to measure the accuracy
            on is not available. Nothing is written then.
    """
    if to not in FORMATS:
        raise UserError(f"unknown format {to!r}; allowed: {', '.join(FORMATS)}")
    if quantize is not None and to != "onnx":
        raise UserError(f"--quantize {quantize} is not available for --to {to}; give --to onnx")
    export_format = FORMATS[to]
    missing = [module for module in export_format.needs if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"--to {to} needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    suffix = Path(export_format.name).suffix
    if output is not None and output.suffix != suffix and suffix:
        raise UserError(f"--output {output} does not fit --to {to}; allowed: a name that ends in {suffix}")
    loaded = load_run(run, device="cpu", checkpoint=checkpoint)
    loaded.print_checkpoint()
    name = export_format.name if quantize is None else f"model-{quantize}.onnx"
    final = output or loaded.output_folder("export") / name
    with (
        atomic_io.as_save_error(f"{final} cannot be written; choose another --output"),
        atomic_io.staged(final) as partial,
    ):
        comparison = write_verified(loaded, to, partial) if quantize is None else write_quantized(loaded, partial)
    print(f"written to {printable(str(final))}: {comparison}")
    if to == "timm":
        print(f"to open it: {imports(loaded.model)}; timm.create_model({f'{FOLDER}{final}'!r}, pretrained=True)")
    return final


def write_verified(run: TrainedModel, to: str, path: Path) -> str:
    """Write `run`, which must be on the CPU, to `path`, load it again and return a sentence that compares the two.

    Raises:
        UserError: if it cannot be exported to that format or loaded again, or if its logits differ.
    """
    export_format = FORMATS[to]
    images, dataset = _comparison_images(run)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            export_format.write(run, path)
            difference = _max_difference(run, export_format.load(path), images)
    except OSError:
        raise
    except Exception as error:  # exporters raise exceptions of any type for what they do not support
        raise UserError(f"{run.source} cannot be exported to {to}: {_reason(error)}; try another --to") from None
    if not math.isfinite(difference):
        raise non_finite_error(run)
    if difference > TOLERANCE:
        raise UserError(
            f"the logits of {run.source} exported to {to} differ by up to {difference:.1e}; allowed: {TOLERANCE:.0e}; "
            "try another --to"
        )
    return f"the logits differ by at most {difference:.1e} on {counted(len(images), 'image')} of {printable(dataset)}"


def write_quantized(run: TrainedModel, path: Path) -> str:
    """Write `run` to `path` as an ONNX program with 8-bit weights, and return a sentence about its accuracy and size.

    Raises:
        UserError: as `write_verified`, or if the data set is not available.
    """
    dataset = run.dataset()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        program = Path(folder) / "model.onnx"
        write_verified(run, "onnx", program)
        try:
            quantize_program(program, path)
        except OSError:
            raise
        except Exception as error:  # onnxruntime may raise anything
            raise UserError(f"{run.source} cannot be quantized: {_reason(error)}; leave --quantize out") from None
        before, after = (accuracy(_load_onnx(file), dataset.test, run.input_size) for file in (program, path))
        sizes = [file.stat().st_size / 1e6 for file in (program, path)]
    measured = {"dataset": dataset.name, "evaluated_on": dataset.evaluated_on, "images": len(dataset.test.labels)}
    add_metadata(path, {**measured, "accuracy": after, "accuracy_before": before})
    return (
        f"{dataset.evaluated_on} accuracy on {printable(dataset.name)} {after:.2%}, before {before:.2%} "
        f"({counted(len(dataset.test.labels), 'image')}); {sizes[1]:.2f} MB, before {sizes[0]:.2f} MB"
    )


def describe(run: TrainedModel) -> dict[str, str]:
    """Return the metadata that is needed to build the model and use its outputs; lists are JSON."""
    mean, std = run.normalisation
    return {
        "architecture": run.architecture,
        "model_args": json.dumps(get_model_args(run.model)),
        "class_names": json.dumps(run.classes),
        "image_size": str(run.input_size.image_size),
        "resize": str(run.rendering),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "fastvit_train": __version__,
    }


class _WithNormalization(nn.Module):
    """Normalization and model in one: from uint8 images (batch, channels, height, width) to logits (batch, classes)."""

    def __init__(self, run: TrainedModel) -> None:
        super().__init__()
        self.model = run.model
        self.preprocess = Preprocess(*run.normalisation, run.input_size, run.device)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.preprocess(images))


def _example_inputs(run: TrainedModel) -> tuple[Tensor]:
    # With a batch of one, the exporter would fix the batch size to 1.
    return (torch.zeros(2, *run.input_size, dtype=torch.uint8),)


def _write_onnx(run: TrainedModel, path: Path) -> None:
    program = torch.onnx.export(
        _WithNormalization(run).eval(),
        _example_inputs(run),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    assert program is not None
    program.model.metadata_props.update(describe(run))
    program.save(path, external_data=False)


def _load_onnx(path: Path) -> LogitsFunction:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_torch(run: TrainedModel, path: Path) -> None:
    batch = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(_WithNormalization(run).eval(), _example_inputs(run), dynamic_shapes=batch)
    torch.export.save(program, path, extra_files={METADATA: json.dumps(describe(run), indent=1)})


def _load_torch(path: Path) -> LogitsFunction:
    return torch.export.load(path).module()


def _write_safetensors(run: TrainedModel, path: Path) -> None:
    _write_weights(run, path, describe(run))


def _write_weights(run: TrainedModel, path: Path, metadata: dict[str, str]) -> None:
    weights = {name: value.clone().contiguous() for name, value in run.model.state_dict().items()}
    save_file(weights, path, {"format": "pt", **metadata})


def _load_safetensors(path: Path) -> LogitsFunction:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    model = timm.create_model(metadata["architecture"], **json.loads(metadata["model_args"]))
    model.load_state_dict(load_file(path))
    mean, std = json.loads(metadata["mean"]), json.loads(metadata["std"])
    return _with_preprocessing(model, mean, std, InputSize.of(len(mean), metadata["image_size"]))


def _write_timm(run: TrainedModel, path: Path) -> None:
    path.mkdir()
    # No further metadata: safetensors writes several entries in an order that changes from run to run.
    _write_weights(run, path / "model.safetensors", {})
    mean, std = run.normalisation
    preprocessing: dict[str, Any] = {"input_size": tuple(run.input_size), "mean": mean, "std": std}
    entries: dict[str, Any] = {} if run.class_names is None else {"label_names": list(run.class_names)}
    if run.config is not None:  # timm's entries describe its own weights, not the ones trained here
        preprocessing |= run.rendering.timm_entries()
        entries["pretrained_cfg"] = {"license": None}
    write_timm_config(run.model, path / "config.json", entries, preprocessing)


def _load_timm(path: Path) -> LogitsFunction:
    model = timm.create_model(f"{FOLDER}{path}", pretrained=True)
    cfg = pretrained_cfg(model)
    return _with_preprocessing(model, cfg["mean"], cfg["std"], InputSize(*cfg["input_size"]))


def _with_preprocessing(
    model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], input_size: InputSize
) -> LogitsFunction:
    model, preprocess = model.eval(), Preprocess(mean, std, input_size, torch.device("cpu"))
    return lambda images: model(preprocess(images))


FORMATS = {
    "onnx": Format("model.onnx", _write_onnx, _load_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": Format("model.pt2", _write_torch, _load_torch),
    "safetensors": Format("model.safetensors", _write_safetensors, _load_safetensors),
    "timm": Format("timm", _write_timm, _load_timm),
}
"""by the value of --to"""


def _comparison_images(run: TrainedModel) -> tuple[Tensor, str]:
    """Return images to compare logits on, uint8 (up to 256, *size), and the name of their data set.

    They are spread evenly over the run's test set, or over that of the digits if the run's is not available here.
    """
    data = run.config.data if run.config is not None else DataConfig()
    try:
        # stream decodes only the selected images; the invalid URL prevents a download.
        return _test_images(replace(data, stream="always", data_url="none:"), run.input_size)
    except UserError:
        return _test_images(DataConfig(), run.input_size)


def _test_images(config: DataConfig, size: InputSize) -> tuple[Tensor, str]:
    dataset = load_dataset(config, size)
    count = len(dataset.test.labels)
    samples = torch.linspace(0, count - 1, min(count, MAX_IMAGES)).long()
    return dataset.test.resized_pixels(samples, size), dataset.name


def _max_difference(run: TrainedModel, compute: LogitsFunction, images: Tensor) -> float:
    """Return the maximum difference of a logit, over a batch of one image and batches of 64; NaN if a logit is NaN."""
    batches = [images[:1], *(batch for batch in images[1:].split(BATCH_SIZE) if len(batch))]
    differences = [(compute(batch) - run.model(run.preprocess(batch))).abs().max() for batch in batches]
    return torch.stack(differences).max().item()


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # the first cause is the shortest and clearest message of an exporter
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
