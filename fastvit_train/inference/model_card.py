"""The model card of a trained model: description, training data, recipe, results and limitations."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fastvit_train.config.init_from import FINAL
from fastvit_train.config.overrides import flatten, map_marked, marked
from fastvit_train.config.recipes import recipe
from fastvit_train.config.schema import TrainConfig
from fastvit_train.config.timm_config import imports, needs_import
from fastvit_train.config.validation import HUGGING_FACE, Mark
from fastvit_train.inference.trained_model import TrainedModel
from fastvit_train.models import OUR_MODELS
from fastvit_train.runs import comparison
from fastvit_train.runs.results import AVERAGE, BEST_EPOCH, read_runs, read_summary
from fastvit_train.utils.errors import UserError, counted
from fastvit_train.utils.markdown import code, table, text

TASK = "image-classification"
HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
}
"""the data sets that are on the Hub: our name, and the identifier there"""
HUB_NAME = re.compile(HUGGING_FACE + r"([\w.-]+/[\w.-]+)(:.*)?")
MAX_CLASSES_LISTED = 100
TRAIN_COMMAND = "accelerate launch{flags} -m fastvit_train --config config.yaml --exp-name again"


def model_card(run: TrainedModel, repo: str, license: str | None) -> str:
    """Return the README.md of the model in `repo`, USER/NAME: metadata for the Hub in YAML, then Markdown.

    Raises:
        UserError: if the run's summary or metrics cannot be read.
    """
    from_run = run.folder is not None and run.config is not None
    summary = read_summary(run.folder) if run.folder is not None and from_run else {}
    header = _header(run, repo, license, summary).to_yaml()
    parts = [f"---\n{header}\n---", f"# {text(repo.rpartition('/')[2])}", _description(run)]
    if run.folder is not None and run.config is not None:
        parts += [
            _training_data(run, summary),
            _recipe(without_paths(run.config.settings)),
            _results(run, run.folder, summary),
        ]
    else:
        parts.append(
            "## Training\n\nThe training of this model is not documented here: it was not pushed from a run of "
            "fastvit-train. Its training data, recipe and accuracy are unknown. Evaluate it before you use it."
        )
    parts += [_limitations(run, summary), _usage(run, repo)]
    if from_run:
        parts.append(_reproduction(summary))
    return "\n\n".join(parts) + "\n"


def without_paths(config: TrainConfig) -> TrainConfig:
    """Return the settings to publish: of each path only its last component, since the rest describes this machine.

    Initial weights named model.safetensors are renamed: the pushed model has that name, and a run from these settings
    would start from it.
    """
    config = map_marked(config, Mark.PATH, lambda path: Path(path).name or path)
    model, data = config.model, config.data
    if model.weights == FINAL:
        model = replace(model, weights=None if model.init_from else f"initial-{FINAL}")  # --init-from brings them
    if _is_local(data.dataset):
        data = replace(data, dataset=HUGGING_FACE + Path(data.dataset.removeprefix(HUGGING_FACE)).resolve().name)
    return replace(config, model=model, data=replace(data, data_url=None))  # a mirror may be a file or hold a token


def _is_local(dataset: str) -> bool:
    """Whether a data set in the Hub's format is a folder, here or on another machine."""
    name = dataset.removeprefix(HUGGING_FACE)
    return name != dataset and (Path(name).is_dir() or Path(name).is_absolute() or name.startswith("."))


def _header(run: TrainedModel, repo: str, license: str | None, summary: dict[str, Any]) -> ModelCardData:
    metadata: dict[str, Any] = {}
    if run.config is not None:
        dataset = without_paths(run.config.settings).data.dataset
        on_hub = None if _is_local(run.config.data.dataset) else HUB_NAME.fullmatch(dataset)
        identifier = on_hub[1] if on_hub else HUB_DATASETS.get(dataset)
        metadata["datasets"] = identifier
        metadata["metrics"] = ["accuracy"]
        name, accuracy = _accuracy(run, summary)
        if accuracy is not None:
            metadata["eval_results"] = [
                EvalResult(
                    task_type=TASK,
                    dataset_type=identifier or dataset,
                    dataset_name=summary["dataset"],
                    dataset_split=summary["evaluated_on"],
                    metric_type="accuracy",
                    metric_name=name,
                    metric_value=accuracy,
                )
            ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag=TASK,
        tags=[TASK, "timm", "fastvit-train"],
        license=license,
        model_name=repo.rpartition("/")[2],
        **{key: value for key, value in metadata.items() if value is not None},
    )


def _accuracy(run: TrainedModel, summary: dict[str, Any]) -> tuple[str, float | None]:
    """Return the name and the value of the weights' accuracy, a fraction; None if they were not evaluated."""
    if run.checkpoint is None:
        return f"accuracy of {_final_weights(summary)}", _number(summary, "test_accuracy")
    accuracy = run.checkpoint.accuracy
    return f"accuracy of epoch {run.checkpoint.epoch}", None if accuracy is None else round(accuracy, 6)


def _number(summary: dict[str, Any], key: str) -> float:
    try:
        return round(float(summary[key]), 6)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{key} in summary.json is missing or is not a number ({error!r}); train the model again"
        ) from None


def _description(run: TrainedModel) -> str:
    origin = " (from fastvit-train)" if run.architecture in OUR_MODELS else " (timm)"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in run.normalisation)
    names = ", ".join(text(name) for name in run.classes[:MAX_CLASSES_LISTED])
    more = f" and {len(run.classes) - MAX_CLASSES_LISTED:,} more" if len(run.classes) > MAX_CLASSES_LISTED else ""
    trained_here = run.config is not None
    size = f"{run.input_size} pixels (height x width)"
    resize = f"resized {run.rendering.describe(size)}" if trained_here else f"{size}, resized as in config.json"
    kind = "gray" if run.input_size.channels == 1 else "RGB"
    return (
        f"An image classifier{', trained with fastvit-train' if trained_here else ''}.\n\n"
        f"- architecture: `{code(run.architecture)}`{origin}\n"
        f"- parameters: {run.parameters:,}\n"
        f"- input: {kind} images, {resize}; "
        f"pixels from 0 to 1, normalized with mean ({mean}) and standard deviation ({std})\n"
        f"- output: logits for {counted(len(run.classes), 'class')}: {names}{more}"
    )


def _training_data(run: TrainedModel, summary: dict[str, Any]) -> str:
    assert run.config is not None
    lines = [f"## Training data\n\nThe training set of {text(summary['dataset'])}."]
    if run.config.data.holdout:
        lines.append(
            f"{run.config.data.holdout:.0%} of it was held out from training; the results below are for these held-out "
            "images. The test set was not used."
        )
    return " ".join(lines)


def _recipe(config: TrainConfig) -> str:
    try:
        base = flatten(recipe(config.run.recipe))
    except UserError:
        return f"## Recipe\n\n`{code(config.run.recipe)}`, which is unknown to this version of fastvit-train."
    values = flatten(config)
    rows = [["setting", "recipe", "this model"]]
    departures = [key for key in values if key not in marked(Mark.NOT_A_DEPARTURE) and values[key] != base[key]]
    rows += [[key, *("default" if v is None else text(v) for v in (base[key], values[key]))] for key in departures]
    changes = f" with these changes:\n\n{table(rows)}" if len(rows) > 1 else " without changes."
    return f"## Recipe\n\n`{code(config.run.recipe)}`{changes}\n\nAll settings are in `config.yaml`."


def _results(run: TrainedModel, folder: Path, summary: dict[str, Any]) -> str:
    _, *rows = comparison.comparison_rows(read_runs([folder]))
    split = summary["evaluated_on"]
    images = "the held-out images" if split == "holdout" else f"the {text(split)} set"
    results = table([["", "value"], *([name, text(value)] for name, value in rows)])
    return (
        f"## Results\n\n{_which_weights(run)}{results}\n\n"
        f"The accuracy is that of {_final_weights(summary)}, on {images}. {_bias(summary)}: do not compare it with the "
        "test accuracy of other models. `metrics.jsonl` has the metrics of every epoch."
    )


def _final_weights(summary: dict[str, Any]) -> str:
    names = {BEST_EPOCH: "the best epoch", AVERAGE: "the average of the last epochs' weights"}
    return names.get(str(summary.get("final_weights")), "the last epoch")


def _bias(summary: dict[str, Any]) -> str:
    """Return which accuracy was chosen on the images that it is of."""
    if summary.get("final_weights") == BEST_EPOCH:
        return "The best epoch was chosen on these images, so its accuracy is biased upwards"
    return "The highest accuracy of all epochs was chosen on the same images, so it is biased upwards"


def _which_weights(run: TrainedModel) -> str:
    if run.checkpoint is None:
        return ""
    return f"The weights are those of {run.checkpoint}. The table describes the whole run and its final weights.\n\n"


def _limitations(run: TrainedModel, summary: dict[str, Any]) -> str:
    holdout = (
        " The results are for images held out from the training set, not for the test set."
        if summary.get("evaluated_on") == "holdout"
        else ""
    )
    return (
        f"## Limitations\n\nThe model sees images of {run.input_size} pixels and predicts one of "
        "its classes for every image, even for an image of something else. It has not been evaluated for bias, "
        f"robustness, safety or any other use.{holdout}"
    )


def _usage(run: TrainedModel, repo: str) -> str:
    ours = "  # install fastvit_train from its repository; it registers its models with timm"
    note = ours if needs_import(run.model) else ""
    mode = "L" if run.input_size.channels == 1 else "RGB"
    return f"""## Usage

```python
{imports(run.model)}{note}
from PIL import Image
model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
print(model(transform(Image.open("image.png").convert("{mode}"))[None]).softmax(1))
```

```bash
python -m fastvit_train eval hf-hub:{repo} --dataset folder --data-dir photos
```"""


def _reproduction(summary: dict[str, Any]) -> str:
    processes, precision = summary.get("world_size"), summary.get("mixed_precision")
    flags = f" --multi_gpu --num_processes {processes}" if isinstance(processes, int) and processes > 1 else ""
    if precision != "no":
        flags += f" --mixed_precision {shlex.quote(code(str(precision)))}"
    return f"## Reproduction\n\n```bash\n{TRAIN_COMMAND.format(flags=flags)}\n```"
