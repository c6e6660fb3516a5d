"""The model card of a trained model: what it is, what it was trained on and how well, and what isn't known."""

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fastvit_train.config.overrides import flatten, marked
from fastvit_train.config.recipes import recipe
from fastvit_train.config.schema import TrainConfig
from fastvit_train.config.validation import Mark
from fastvit_train.inference.trained_model import TrainedModel
from fastvit_train.models import OUR_MODELS
from fastvit_train.runs import comparison
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.markdown import code, table, text

TASK = "image-classification"
PUBLIC = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
}
"""the Hub's names of data sets, by ours; what a folder holds, only its owner knows"""
MOST_CLASSES = 100
REPEATED = "accelerate launch{flags} -m fastvit_train --config config.yaml --exp-name again"


def model_card(run: TrainedModel, repo: str, license: str | None) -> str:
    """README.md of the model in `repo`, USER/NAME: YAML for the Hub, then Markdown.

    Raises:
        UserError: where the run's summary or metrics can't be read.
    """
    known = run.folder is not None and run.config is not None
    summary = comparison.read_summary(run.folder) if run.folder is not None and known else {}
    header = _header(run, repo, license, summary).to_yaml()
    parts = [f"---\n{header}\n---", f"# {text(repo.rpartition('/')[2])}", _what_it_is(run)]
    if run.folder is not None and run.config is not None:
        parts += [_training_data(run, summary), _recipe(run.config.settings), _results(run.folder, summary)]
    else:
        parts.append(
            "## What isn't known\n\nNo run of fastvit-train's came with this model: what it was trained on, how, for "
            "how long and how well it does are not recorded here. Evaluate it before you rely on it."
        )
    parts += [_limits(run, summary), _use(run, repo)]
    if known:
        parts.append(_again(summary))
    return "\n\n".join(parts) + "\n"


def _header(run: TrainedModel, repo: str, license: str | None, summary: dict[str, Any]) -> ModelCardData:
    described: dict[str, Any] = {}
    if run.config is not None:
        dataset = run.config.data.dataset
        described["datasets"] = PUBLIC.get(dataset)
        described["metrics"] = ["accuracy"]
        described["eval_results"] = [
            EvalResult(
                task_type=TASK,
                dataset_type=PUBLIC.get(dataset, dataset),
                dataset_name=summary["dataset"],
                dataset_split=summary["evaluated_on"],
                metric_type="accuracy",
                metric_name="accuracy of the last epoch",
                metric_value=_number(summary, "test_accuracy"),
            )
        ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag=TASK,
        tags=[TASK, "timm", "fastvit-train"],
        license=license,
        model_name=repo.rpartition("/")[2],
        **{key: value for key, value in described.items() if value is not None},
    )


def _number(summary: dict[str, Any], key: str) -> float:
    try:
        return round(float(summary[key]), 6)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"summary.json has no {key} that is a number ({error!r}); run it again") from None


def _what_it_is(run: TrainedModel) -> str:
    ours = " (a model of fastvit-train's)" if run.architecture in OUR_MODELS else " (timm)"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in run.normalisation)
    names = ", ".join(text(name) for name in run.classes[:MOST_CLASSES])
    more = f" and {len(run.classes) - MOST_CLASSES:,} more" if len(run.classes) > MOST_CLASSES else ""
    ours_to_say = run.config is not None
    resized = "the shorter side resized (bilinear), the centre cut out"
    resized = resized if ours_to_say else "resized as config.json has it"
    return (
        f"An image classifier{', trained with fastvit-train' if ours_to_say else ''}.\n\n"
        f"- architecture: `{code(run.architecture)}`{ours}\n"
        f"- parameters: {run.parameters:,}\n"
        f"- input: RGB images of {run.image_size} x {run.image_size} pixels, {resized}; "
        f"pixels from 0 to 1 normalised by mean ({mean}) and standard deviation ({std})\n"
        f"- output: logits of {len(run.classes):,} classes: {names}{more}"
    )


def _training_data(run: TrainedModel, summary: dict[str, Any]) -> str:
    assert run.config is not None
    lines = [f"## Training data\n\n{text(summary['dataset'])}, its training set."]
    if run.config.data.holdout:
        lines.append(
            f"{run.config.data.holdout:.0%} of it was held out of training and is what the figures below were "
            "evaluated on; the test set was not looked at."
        )
    return " ".join(lines)


def _recipe(config: TrainConfig) -> str:
    try:
        base = flatten(recipe(config.run.recipe))
    except UserError:
        return f"## Recipe\n\n`{code(config.run.recipe)}`, which this version of fastvit-train doesn't know."
    own = flatten(config)
    rows = [["setting", "recipe", "here"]]
    departures = [key for key in own if key not in marked(Mark.NOT_A_DEPARTURE) and own[key] != base[key]]
    rows += [[key, *("default" if v is None else text(v) for v in (base[key], own[key]))] for key in departures]
    differing = f", except:\n\n{table(rows)}" if len(rows) > 1 else ", as it is."
    return f"## Recipe\n\n`{code(config.run.recipe)}`{differing}\n\nAll settings are in `config.yaml`."


def _results(folder: Path, summary: dict[str, Any]) -> str:
    _, *rows = comparison.figures([folder])
    on = summary["evaluated_on"]
    images = "the held-out images" if on == "holdout" else f"the {text(on)} set"
    shown = table([["", "figure"], *([name, text(value)] for name, value in rows)])
    return (
        f"## Results\n\n{shown}\n\nAccuracy is that of the last epoch, on {images}. The best epoch's was chosen on the "
        f"same images, which flatters it: don't compare it with others' test accuracy. Metrics of every epoch are in "
        "`metrics.jsonl`."
    )


def _limits(run: TrainedModel, summary: dict[str, Any]) -> str:
    held = (
        " As the figures are of images held out of the training set, they say nothing of the test set."
        if summary.get("evaluated_on") == "holdout"
        else ""
    )
    trained = "Trained on small" if run.config is not None else "Made for"
    return (
        f"## Limits\n\n{trained} images ({run.image_size} x {run.image_size} pixels) of these classes only: it "
        "answers with one of them whatever it is shown. It has not been evaluated for anything else, nor for bias, "
        f"robustness or safety.{held}"
    )


def _use(run: TrainedModel, repo: str) -> str:
    return f"""## How to use it

```python
import timm, fastvit_train  # installed from its repository, fastvit_train registers its models with timm
from PIL import Image
model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
print(model(transform(Image.open("image.png").convert("RGB"))[None]).softmax(1))
```

```bash
python -m fastvit_train eval hf-hub:{repo} --dataset folder --data-dir photos
```"""


def _again(summary: dict[str, Any]) -> str:
    processes, precision = summary.get("world_size"), summary.get("mixed_precision")
    flags = f" --multi_gpu --num_processes {processes}" if isinstance(processes, int) and processes > 1 else ""
    if precision != "no":
        flags += f" --mixed_precision {shlex.quote(code(str(precision)))}"
    return f"## How to train it again\n\n```bash\n{REPEATED.format(flags=flags)}\n```"
