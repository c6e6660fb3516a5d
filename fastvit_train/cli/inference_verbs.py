"""The verbs for what was trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastvit_train.config.names import check_attention_name
from fastvit_train.config.schema import DatasetName, RunConfig
from fastvit_train.utils.console import Terminal
from fastvit_train.utils.errors import UserError


@dataclass(frozen=True)
class Eval:
    """Evaluate a trained model: accuracy, calibration, confusion matrix.

    And top-5 accuracy, loss, and the precision and recall of each class.
    """

    run: str
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a name of timm's"""
    dataset: DatasetName | None = None
    """evaluate on its test set; by default on what the run was evaluated on"""
    data_dir: str | None = None
    """where the data lies, if no longer where the run found it"""
    attention: str | None = None
    """how attention is computed; the run's own by default"""
    batch_size: int = RunConfig.eval_batch_size
    """images per step and process"""
    output: Path | None = None
    """folder for evaluation.json and confusion.png; eval/ in the run's folder by default"""


def evaluate(command: Eval) -> None:
    if command.attention is not None:
        check_attention_name(command.attention)
    from fastvit_train.distributed.accelerator import leave_process_group
    from fastvit_train.inference.evaluate import evaluate_run, show

    evaluated = evaluate_run(
        command.run,
        dataset=command.dataset,
        data_dir=command.data_dir,
        attention=command.attention,
        batch_size=command.batch_size,
    )
    show(evaluated, command.output)
    leave_process_group()


@dataclass(frozen=True)
class Predict:
    """Say what images show: the most probable classes of each."""

    run: str
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a name of timm's"""
    images: tuple[str, ...]
    """files, folders, patterns; - reads an image, or names of images, from standard input"""
    top: int = 3
    """classes to tell of each image"""
    json: bool = False
    """print a line of JSON per image"""
    show: bool = False
    """draw the images with their predictions"""
    batch_size: int = 256
    """images at a time"""
    output: Path | None = None
    """folder for the pictures of --show; predictions/ in the run's folder by default"""


def predict(command: Predict) -> int:
    from fastvit_train.distributed import preflight
    from fastvit_train.inference.predict import predict_images

    preflight.check_single_process("predict")
    broken = predict_images(
        command.run,
        command.images,
        top=command.top,
        batch_size=command.batch_size,
        as_json=command.json,
        show=command.show,
        output=command.output,
    )
    return 1 if broken else 0


@dataclass(frozen=True)
class Inspect:
    """Draw what a trained model looks at, and what it has learned."""

    run: str
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a name of timm's"""
    images: tuple[str, ...]
    """files, folders, patterns; by default one of each class of the test set"""
    data_dir: str | None = None
    """where the test set lies, if no longer where the run found it"""
    output: Path | None = None
    """folder for the pictures; inspect/ in the run's folder by default"""


def inspect(command: Inspect) -> None:
    from fastvit_train.distributed import preflight
    from fastvit_train.inference.inspect import inspect_run

    preflight.check_single_process("inspect")
    for path in inspect_run(command.run, command.images, command.output, command.data_dir):
        print(f"written to {path}")


@dataclass(frozen=True)
class Report:
    """Write a page on one run or several, to be opened in a browser."""

    runs: tuple[str, ...]
    """runs' folders, local-dir:FOLDER, hf-hub:USER/MODEL, or names of timm's"""
    output: Path | None = None
    """the page; report.html in the first run's folder by default"""
    data_dir: str | None = None
    """where the data lies, if no longer where the runs found it"""


def report(command: Report) -> None:
    from fastvit_train.distributed import preflight
    from fastvit_train.inference.report.page import write_report

    preflight.check_single_process("report")
    print(f"written to {write_report(command.runs, command.output, command.data_dir)}")


@dataclass(frozen=True)
class Export:
    """Write a trained model for others to run, and check it by them."""

    run: str
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a name of timm's"""
    to: Literal["onnx", "torch-export", "safetensors", "timm"] = "onnx"
    """onnx and torch-export take uint8 images; safetensors and timm are weights and what else is needed"""
    output: Path | None = None
    """file, or for timm folder; in export/ in the run's folder by default"""


def export(command: Export) -> None:
    from fastvit_train.distributed import preflight
    from fastvit_train.inference.export import export_run

    preflight.check_single_process("export")
    export_run(command.run, command.to, command.output)


@dataclass(frozen=True)
class Push:
    """Send a trained model to the Hugging Face Hub, with a model card."""

    run: str
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a name of timm's"""
    repo: str
    """USER/NAME on the Hub"""
    public: bool = False
    """let everyone see it; without, only you do"""
    dry_run: bool = False
    """write what would be pushed into hub/ in the run's folder, and send nothing"""
    license: str | None = None
    """the Hub's name of a license, such as apache-2.0, for the model card"""


def push(command: Push) -> None:
    from fastvit_train.distributed import preflight
    from fastvit_train.inference.push import push_run

    preflight.check_single_process("push")
    push_run(command.run, command.repo, public=command.public, dry_run=command.dry_run, license=command.license)


@dataclass(frozen=True)
class Compare:
    """Put runs side by side: a table, and their curves in one picture."""

    runs: tuple[Path, ...]
    """folders of finished runs"""
    output: Path = Path("curves.png")
    """where the picture goes"""
    markdown: bool = False
    """print the table as Markdown"""


def compare(command: Compare) -> None:
    runs = list(command.runs)
    if not runs:
        raise UserError("compare takes the folders of one or more runs, as in: compare runs/a runs/b")
    from fastvit_train.runs import comparison, plots

    plots.plot_curves(runs, command.output, comparison.dataset_names(runs))
    if command.markdown:
        print(comparison.markdown_table(runs))
    else:
        Terminal().print(comparison.table(runs))
    print(f"written to {command.output}")
