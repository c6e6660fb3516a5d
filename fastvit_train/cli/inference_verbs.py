"""The verbs that take a trained model; each imports what it needs when it runs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastvit_train.cli.arguments import (
    AttentionName,
    Checkpoint,
    DataDir,
    DatasetArgument,
    Images,
    License,
    OutputFolder,
    OutputPath,
    Repository,
    Run,
    RunFolders,
    Runs,
    RunsFolder,
)
from fastvit_train.config.names import check_attention_name
from fastvit_train.config.schema import RunConfig
from fastvit_train.config.validation import FLAGS, DatasetName, checked
from fastvit_train.distributed.slow_imports import slow_imports
from fastvit_train.utils.console import Terminal
from fastvit_train.utils.errors import UserError, printable

MAX_NAMED = 10
"""arguments that one line names"""


@dataclass(frozen=True)
class Eval:
    """Evaluate a trained model: accuracy, calibration, confusion matrix.

    Also computes top-5 accuracy, loss, and the precision and recall of each class.
    """

    run: Run
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a timm model name"""
    checkpoint: Checkpoint = None
    """weights of a run: best, last, or the step of one in checkpoints/; default: the final ones"""
    dataset: DatasetArgument = None
    """evaluate on the test set of this data set; default: the data that the run was evaluated on"""
    data_dir: DataDir = None
    """folder of the data sets, if they have moved since the training"""
    attention: AttentionName = None
    """implementation of attention; default: the run's own"""
    batch_size: int = RunConfig.eval_batch_size
    """images per evaluation step and process"""
    tta: Literal["none", "flip", "shift"] = "none"
    """test-time augmentation: average the predictions for each image and its mirror image, or also shifted ones"""
    output: OutputFolder = None
    """folder for evaluation.json and the pictures; default: eval/ in the run's folder"""


def evaluate(command: Eval) -> None:
    if command.attention is not None:
        check_attention_name(command.attention)
    if command.dataset is not None:
        checked("dataset", command.dataset, DatasetName, FLAGS)
    with slow_imports():
        from fastvit_train.distributed.accelerator import leave_process_group
        from fastvit_train.inference.evaluate import evaluate_run
        from fastvit_train.inference.evaluation_output import show

    evaluated = evaluate_run(
        command.run,
        dataset=command.dataset,
        data_dir=command.data_dir,
        attention=command.attention,
        batch_size=command.batch_size,
        checkpoint=command.checkpoint,
        tta=command.tta,
    )
    show(evaluated, command.output)
    leave_process_group()


@dataclass(frozen=True)
class Predict:
    """Classify images: print the most probable classes of each."""

    run: Run
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a timm model name"""
    images: Images
    """files, folders or patterns; - reads an image, or a list of file names, from standard input"""
    checkpoint: Checkpoint = None
    """weights of a run: best, last, or the step of one in checkpoints/; default: the final ones"""
    top: int = 3
    """number of classes to print for each image"""
    json: bool = False
    """print one line of JSON per image"""
    show: bool = False
    """draw the images with their predictions"""
    batch_size: int = 256
    """images per forward pass"""
    output: OutputFolder = None
    """folder for the pictures of --show; default: predictions/ in the run's folder"""


def predict(command: Predict) -> int:
    with slow_imports():
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
        checkpoint=command.checkpoint,
    )
    return 1 if broken else 0


@dataclass(frozen=True)
class Inspect:
    """Draw a trained model's attention maps and learned filters."""

    run: Run
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a timm model name"""
    images: Images
    """files, folders or patterns; default: one image of each class of the test set"""
    checkpoint: Checkpoint = None
    """weights of a run: best, last, or the step of one in checkpoints/; default: the final ones"""
    data_dir: DataDir = None
    """folder of the data sets, if they have moved since the training"""
    output: OutputFolder = None
    """folder for the pictures; default: inspect/ in the run's folder"""


def inspect(command: Inspect) -> None:
    with slow_imports():
        from fastvit_train.distributed import preflight
        from fastvit_train.inference.inspect import inspect_run

    preflight.check_single_process("inspect")
    paths = inspect_run(command.run, command.images, command.output, command.data_dir, command.checkpoint)
    for path in paths:
        print(f"written to {path}")


@dataclass(frozen=True)
class Report:
    """Write an HTML report about one or more runs."""

    runs: Runs
    """runs' folders, local-dir:FOLDER, hf-hub:USER/MODEL, or timm model names"""
    output: OutputPath = None
    """file to write; default: report.html in the first run's folder"""
    data_dir: DataDir = None
    """folder of the data sets, if they have moved since the training"""


def report(command: Report) -> None:
    with slow_imports():
        from fastvit_train.distributed import preflight
        from fastvit_train.inference.report.page import write_report
        from fastvit_train.runs.results import RUN_FILES, split_off_others

    preflight.check_single_process("report")
    named, others = split_off_others(command.runs, (*RUN_FILES, "config.json"))
    _print_passed_over(others if named else ())
    print(f"written to {write_report(named or command.runs, command.output, command.data_dir)}")


@dataclass(frozen=True)
class Export:
    """Export a trained model to another format, and check the result."""

    run: Run
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a timm model name"""
    checkpoint: Checkpoint = None
    """weights of a run: best, last, or the step of one in checkpoints/; default: the final ones"""
    to: Literal["onnx", "torch-export", "safetensors", "timm"] = "onnx"
    """onnx and torch-export write a program that takes uint8 images; safetensors and timm write weights and a config"""
    quantize: Literal["int8"] | None = None
    """onnx only: 8-bit weights; the accuracy with them and without is measured on the run's evaluation images"""
    output: OutputPath = None
    """file, or folder for timm; default: a name in export/ in the run's folder"""


def export(command: Export) -> None:
    with slow_imports():
        from fastvit_train.distributed import preflight
        from fastvit_train.inference.export import export_run

    preflight.check_single_process("export")
    export_run(command.run, command.to, command.output, command.checkpoint, command.quantize)


@dataclass(frozen=True)
class Push:
    """Upload a trained model with a model card to the Hugging Face Hub."""

    run: Run
    """a run's folder, local-dir:FOLDER, hf-hub:USER/MODEL, or a timm model name"""
    repo: Repository
    """USER/NAME on the Hub"""
    checkpoint: Checkpoint = None
    """weights of a run: best, last, or the step of one in checkpoints/; default: the final ones"""
    public: bool = False
    """make a new repository public (default: private); also needed to push to an existing public repository"""
    dry_run: bool = False
    """write the files to hub/ in the run's folder, and upload nothing"""
    license: License = None
    """license for the model card, by its name on the Hub, such as apache-2.0"""


def push(command: Push) -> None:
    with slow_imports():
        from fastvit_train.distributed import preflight
        from fastvit_train.inference.push import push_run

    preflight.check_single_process("push")
    push_run(
        command.run,
        command.repo,
        public=command.public,
        dry_run=command.dry_run,
        license=command.license,
        checkpoint=command.checkpoint,
    )


@dataclass(frozen=True)
class Compare:
    """Compare runs: print a table, and draw their curves in one picture.

    Runs that are still in training are compared by their results so far.
    """

    runs: RunFolders
    """folders of runs; in runs/*, what is not a run is passed over"""
    output: Path = Path("curves.png")
    """file for the picture"""
    x_axis: Literal["auto", "epoch", "step", "time"] = "auto"
    """what the curves are drawn over; auto: the step for runs of up to three epochs, otherwise the epoch"""
    rows: tuple[str, ...] = ()
    """names of the rows to print, in this order, without dashes; default: all"""
    markdown: bool = False
    """print the table as Markdown"""
    json: bool = False
    """print the results as a JSON list with an object per run, and nothing else"""
    csv: bool = False
    """print the results as CSV with a line per run, and nothing else"""


def compare(command: Compare) -> None:
    if not command.runs:
        raise UserError("compare takes the folders of one or more runs, as in: compare runs/a runs/b")
    formats = [name for name in ("markdown", "json", "csv") if getattr(command, name)]
    if len(formats) > 1:
        raise UserError(f"compare prints one format; give only one of {', '.join(f'--{name}' for name in formats)}")
    if command.rows and (command.json or command.csv):
        raise UserError(f"--{formats[0]} prints the results in full: omit --rows")
    with slow_imports():
        from fastvit_train.runs import comparison, results
        from fastvit_train.runs.plots.curves import plot_curves

    named, others = results.split_off_others([str(run) for run in command.runs], results.RUN_FILES)
    if not named:
        raise UserError(f"{others[0]} is not a run: it has no config.yaml; give the folders of runs, as in: runs/*")
    _print_passed_over(others)
    runs = results.read_runs([Path(name) for name in named])
    if command.json or command.csv:
        print(comparison.RECORDS[formats[0]](runs))
    elif command.markdown:
        print(comparison.markdown_table(runs, command.rows))
    else:
        Terminal().print(comparison.table(runs, command.rows))
    started = [run.folder for run in runs if run.results.get("epochs")]
    if started:
        plot_curves(started, command.output, comparison.dataset_names(runs), command.x_axis)
    written = f"written to {command.output}" if started else "no epoch has ended yet, so no curves were drawn"
    print(written, file=sys.stderr if command.json or command.csv else sys.stdout)


@dataclass(frozen=True)
class Watch:
    """Show runs and their curves as they train, on a page of this machine.

    The page only reads. It lists the runs with their states, compares those that are ticked, and opens their reports.
    """

    runs_dir: RunsFolder
    """folder that holds the runs; default: runs"""
    port: int = 8321
    """port on 127.0.0.1; 0 takes one that is free"""


def watch(command: Watch) -> None:
    if len(command.runs_dir) > 1:
        raise UserError("watch takes one folder that holds runs, as in: watch runs; by default it is runs")
    with slow_imports():
        from fastvit_train.distributed import preflight
        from fastvit_train.inference.watch.server import serve

    preflight.check_single_process("watch")
    serve(command.runs_dir[0] if command.runs_dir else Path(RunConfig.runs_dir), command.port)


def _print_passed_over(others: Sequence[str]) -> None:
    """Print a line about arguments that are not runs: runs/* names reports and results of several seeds too."""
    if others:
        names = ", ".join(map(printable, others[:MAX_NAMED]))
        more = f" and {len(others) - MAX_NAMED:,} more" if len(others) > MAX_NAMED else ""
        print(f"passed over, because there is no run in it: {names}{more}", file=sys.stderr)
