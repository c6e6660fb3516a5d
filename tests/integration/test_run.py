"""A run in one process: what it learns, what it leaves behind, and that stopping and resuming changes nothing."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from fastvit_train.cli.main import main
from fastvit_train.config.schema import TrainConfig
from fastvit_train.inference.evaluate import evaluate_run
from fastvit_train.models.resolve import fill_defaults
from fastvit_train.runs import checkpoint, comparison
from fastvit_train.runs.plots.curves import plot_curves
from fastvit_train.runs.results import read_runs
from fastvit_train.runs.run_folder import RunFolder, read_jsonl
from fastvit_train.training.loop import fit
from fastvit_train.training.setup import setup
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError
from tests.support import write_folder
from tests.support.pictures import record_pictures

SmallConfig = Callable[..., TrainConfig]
SUMMARY_KEYS = {
    "model", "dataset", "parameters", "epochs", "steps", "test_accuracy", "best_test_accuracy", "test_loss",
    "balanced_test_accuracy", "cores_used_by_others",
    "train_seconds", "compile_seconds", "images_per_second", "peak_memory_mib", "energy_joules", "attention",
    "mixed_precision", "world_size", "device", "versions",
}  # fmt: skip


def same_weights(a: Path, b: Path) -> bool:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def without_clock(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    clock = ("seconds", "eval_seconds", "images_per_second", "peak_memory_mib")
    clock += ("energy_joules", "mean_power_watts", "gpu_utilization")
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]


def documented_fields(file: str) -> set[str]:
    """Return the names in the first column of the table that docs/run-folder.md has of `file`."""
    page = (Path(__file__).parents[2] / "docs" / "run-folder.md").read_text(encoding="utf-8")
    table = page.split(f"\n## {file}\n")[1].split("\n## ")[0]
    return {
        name for line in table.splitlines() if line.startswith("| `") for name in line.split("|")[1].split("`")[1::2]
    }


@pytest.mark.slow
def test_a_run_leaves_everything_behind(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = record_pictures(monkeypatch)
    summary = fit(small_config(save_model_every=2, track=["tensorboard"]))
    run = tmp_path / "runs" / "run"
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["energy_joules"] is None and summary["dataset"] == "digits" and summary["steps"] == 15
    rows = read_jsonl(run / "metrics.jsonl")
    assert documented_fields("summary.json") >= summary.keys() and documented_fields("metrics.jsonl") == rows[0].keys()
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["test_accuracy"] == summary["test_accuracy"]
    assert max(row["test_accuracy"] for row in rows) == summary["best_test_accuracy"]
    losses = [row["loss"] for row in read_jsonl(run / "steps.jsonl")]
    assert len(losses) == 15 and sum(losses[:5]) / 5 == pytest.approx(rows[0]["train_loss"])
    assert len(pictures[run / "curves.png"].panels) == 2
    assert (run / "train.log").read_text().count("digits accuracy") == 3
    assert list(run.rglob("events.out.tfevents.*"))
    assert {path.name for path in run.glob("model_epoch_*")} == {"model_epoch_2.safetensors"}
    best = max(rows, key=lambda row: row["test_accuracy"])["step"]
    assert {path.name for path in (run / "checkpoints").glob("step_*")} == {"step_15", "step_10", f"step_{best}"}
    assert (run / "checkpoints" / "best").resolve().name == f"step_{best}"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["attention"], config["image_size"], config["embed_dim"]) == ("fused", 32, 16)


def test_timm_loads_a_run_as_local_dir(small_config: SmallConfig, tmp_path: Path, seed: int) -> None:
    fit(small_config(epochs=1))
    run = tmp_path / "runs" / "run"
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    weights = load_file(run / "model.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert model.pretrained_cfg["label_names"] == list("0123456789")


@pytest.mark.parametrize("accum", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_stopped_and_resumed_is_bit_for_bit_never_stopped(
    small_config: SmallConfig, tmp_path: Path, accum: int
) -> None:
    settings = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "grad_accum": accum, "flip": "alternating", "cutout": 4}
    fit(small_config(exp_name="whole", **settings))
    fit(small_config(exp_name="parts", stop_after=1, **settings))
    fit(small_config(exp_name="parts", stop_after=2, **settings), resume="must")
    summary = fit(small_config(exp_name="parts", **settings), resume="auto")
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    assert summary["epochs"] == 3
    assert same_weights(whole, parts)
    assert (whole / "steps.jsonl").read_text() == (parts / "steps.jsonl").read_text()
    assert without_clock(read_jsonl(whole / "metrics.jsonl")) == without_clock(read_jsonl(parts / "metrics.jsonl"))
    optimizers = [
        torch.load(run / "checkpoints" / "last" / "optimizer.bin", weights_only=True)["state"] for run in (whole, parts)
    ]
    for first, second in zip(optimizers[0].values(), optimizers[1].values(), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
def test_killed_in_the_middle_of_an_epoch_and_resumed(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    data = write_folder(tmp_path / "shapes", per_class=20)
    settings = {"drop_rate": 0.1, "save_every": 3, "ema": 0.9, "sampler": "balanced", "patience": 3}
    settings |= {
        "class_weights": "auto",
        "mixup": 0.2,
        "cutmix": 1.0,
        "auto_augment": "trivial",
        "color_jitter": 0.3,
        "random_erasing": 0.5,
    }
    settings |= {"dataset": "folder", "data_dir": str(data), "batch_size": 8, "stream": "always" if stream else "never"}
    fit(small_config(exp_name="whole", **settings))
    save = checkpoint.save

    def save_and_die(folder, accelerator, scheduler, state, *rest):
        save(folder, accelerator, scheduler, state, *rest)
        if state.step == 9:  # epoch 2 of 5 steps each: in its middle
            raise Killed

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(Killed):
        fit(small_config(exp_name="parts", **settings))
    monkeypatch.undo()
    fit(small_config(exp_name="parts", **settings), resume="must")
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    assert same_weights(whole, parts)
    assert (whole / "steps.jsonl").read_text() == (parts / "steps.jsonl").read_text()
    assert without_clock(read_jsonl(whole / "metrics.jsonl")) == without_clock(read_jsonl(parts / "metrics.jsonl"))


@pytest.mark.slow
def test_evaluating_a_finished_run_again_keeps_what_was_measured_in_training(
    small_config: SmallConfig, tmp_path: Path
) -> None:
    path = tmp_path / "runs" / "run" / "summary.json"
    measured = {"peak_memory_mib": 1.0, "compile_seconds": 2.0, "device": "another"}
    settings = {"epochs": 2, "average_last": 2, "target_accuracy": 0.01}
    first = fit(small_config(**settings))
    path.write_text(json.dumps({**first, **measured}))
    again = fit(small_config(**settings), resume="auto")
    assert again == {**first, **measured} == json.loads(path.read_text())
    shutil.rmtree(path.parent / "checkpoints" / "step_10")
    assert fit(small_config(**settings), resume="auto")["device"] == first["device"], "it trained again"
    path.write_text(json.dumps({**first, **measured}))
    assert fit(small_config(**settings), overwrite=True)["device"] == first["device"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_run_of_a_gpu_goes_on_without_one(small_config: SmallConfig, tmp_path: Path) -> None:
    fit(small_config(stop_after=1, drop_rate=0.1))
    path = tmp_path / "runs" / "run" / "checkpoints" / "last" / checkpoint.PROGRESS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "gpu_rng": [1]}))
    atomic_io.write_checksums(path.parent)
    assert fit(small_config(drop_rate=0.1), resume="must")["epochs"] == 3


@pytest.mark.slow
def test_a_resume_that_lost_the_random_state_is_noticed(small_config: SmallConfig, tmp_path: Path) -> None:
    fit(small_config(stop_after=1, drop_rate=0.1))
    path = tmp_path / "runs" / "run" / "checkpoints" / "last" / "random_states_0.pkl"
    path.write_bytes(b"damaged")  # accelerate only logs that it could not read this
    atomic_io.write_checksums(path.parent)
    with pytest.raises(UserError, match="the random state was not restored"):
        fit(small_config(drop_rate=0.1), resume="must")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "progress.json"])
def test_a_damaged_checkpoint_is_named(small_config: SmallConfig, tmp_path: Path, name: str) -> None:
    fit(small_config(stop_after=1))
    last = tmp_path / "runs" / "run" / "checkpoints" / "last"
    (last / name).write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=f"has no checkpoint that can be loaded: checkpoint step_5 is damaged .{name} does not match"
    ):
        fit(small_config(), resume="must")
    atomic_io.write_checksums(last)
    with pytest.raises(UserError, match=r"checkpoint .*step_5 can't be read"):
        fit(small_config(), resume="must")


@pytest.mark.slow
def test_a_run_that_lost_its_checkpoints_is_not_started_over_unasked(small_config: SmallConfig, tmp_path: Path) -> None:
    fit(small_config(epochs=1))
    run = tmp_path / "runs" / "run"
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="without a checkpoint; start it over with --overwrite"):
        fit(small_config(epochs=1), resume="auto")
    assert (run / "model.safetensors").is_file()


@pytest.mark.slow
def test_resuming_with_other_settings_lists_them(small_config: SmallConfig, tmp_path: Path) -> None:
    fit(small_config(stop_after=1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"another configuration \(seed: 0 -> 1; lr: 0.006 -> 0.5\)"):
        fit(small_config(lr=0.5, seed=1), resume="auto")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_resuming_on_other_data_is_refused(small_config: SmallConfig, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "shapes")
    settings = {"dataset": "folder", "data_dir": str(data), "batch_size": 8}
    fit(small_config(stop_after=1, **settings))
    for split in ("train", "test"):
        (data / split / "circle").rename(data / split / "ring")
    with pytest.raises(UserError, match=r"trained on other data \(classes: \['circle', 'square'\] -> \['ring', "):
        fit(small_config(**settings), resume="auto")
    with pytest.raises(UserError, match=r"trained on the classes \['circle', 'square'\], but shapes has \['ring', "):
        evaluate_run(tmp_path / "runs" / "run")
    for split in ("train", "test"):
        (data / split / "ring").rename(data / split / "circle")
    (data / "train" / "circle" / "0.png").unlink()
    with pytest.raises(UserError, match=r"trained on other data \(training images: 24 -> 23"):
        fit(small_config(**settings), resume="auto")


@pytest.mark.slow
def test_resuming_with_other_weights_of_the_classes_is_refused(small_config: SmallConfig, tmp_path: Path) -> None:
    """The settings have only the name of the file."""
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({str(digit): 1 + digit for digit in range(10)}))
    settings = {"class_weights": str(weights), "epochs": 3}
    fit(small_config(stop_after=1, **settings))
    fit(small_config(stop_after=2, **settings), resume="must")
    weights.write_text(json.dumps({str(digit): 10 - digit for digit in range(10)}))
    with pytest.raises(UserError, match=r"trained on other data \(weights of --class-weights: \w+ -> "):
        fit(small_config(**settings), resume="must")


@pytest.mark.slow
def test_a_folder_that_holds_a_run_is_not_touched_unasked(small_config: SmallConfig, tmp_path: Path) -> None:
    fit(small_config(epochs=1))
    run = tmp_path / "runs" / "run"
    with pytest.raises(UserError, match="already holds a run; give --resume auto .* --overwrite"):
        fit(small_config(epochs=2))
    assert len(read_jsonl(run / "metrics.jsonl")) == 1
    fit(small_config(epochs=2), overwrite=True)
    assert len(read_jsonl(run / "metrics.jsonl")) == 2
    with pytest.raises(UserError, match="give only one of them"):
        fit(small_config(epochs=2), overwrite=True, resume="auto")
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        fit(small_config(exp_name="other"), resume="must")
    assert fit(small_config(exp_name="other", epochs=1), resume="auto")["epochs"] == 1
    foreign = tmp_path / "runs" / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and holds files that do not belong to a run"):
        fit(small_config(exp_name="thesis"), overwrite=True)
    assert (foreign / "chapter.tex").read_text() == "years of work"


@pytest.mark.slow
def test_starting_over_may_be_killed_anywhere(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is the run with all of its checkpoints, or one that --resume auto starts afresh."""
    config = fill_defaults(small_config(epochs=2))
    fit(config)
    run, copy = tmp_path / "runs" / "run", tmp_path / "copy"
    whole = {path.name for path in (run / "checkpoints").iterdir()}
    fresh = []
    for last in range(1, 40):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy, symlinks=True)
        with monkeypatch.context() as patch:
            left = iter(range(last - 1, -1, -1))
            for owner, name in ((Path, "unlink"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
                patch.setattr(owner, name, dying(getattr(owner, name), left))
            try:
                RunFolder(copy).create(config)
            except Killed:
                pass
            else:
                break
        fresh.append(not RunFolder(copy).should_resume(config, "auto", overwrite=False))
        assert fresh[-1] or {path.name for path in (copy / "checkpoints").iterdir()} == whole
    assert True in fresh and last > 5 and fresh == sorted(fresh)


def dying(function: Callable[..., object], left: Iterator[int]) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        if next(left) == 0:
            raise Killed
        return function(*args, **kwargs)

    return call


def test_nothing_is_written_when_something_is_wrong(small_config: SmallConfig, tmp_path: Path) -> None:
    folder = {"dataset": "folder", "data_dir": str(write_folder(tmp_path / "shapes"))}
    (tmp_path / "shapes" / "train" / "square" / "1.png").write_bytes(b"broken")
    (tmp_path / "shapes" / "test" / "square" / "1.png").write_bytes(b"broken")
    before = set(tmp_path.rglob("*"))
    mistakes = [
        {"num_classes": 4},
        {"optimizer": "adahessian"},
        {**folder, "num_heads": 3},
        {**folder, "grad_accum": 7},
        folder,
        {**folder, "stream": "always"},
    ]
    for settings in mistakes:
        with pytest.raises(UserError):
            fit(small_config(**settings))
    assert set(tmp_path.rglob("*")) - before <= {tmp_path / "runs"}
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*"))


@pytest.mark.slow
def test_a_run_evaluates_the_same_under_every_attention(small_config: SmallConfig, tmp_path: Path) -> None:
    summary = fit(small_config(attention="naive"))
    for name in ("naive", "fused", "sdpa"):
        result = evaluate_run(tmp_path / "runs" / "run", attention=name).evaluation
        assert result.accuracy == summary["test_accuracy"]
        assert result.loss == pytest.approx(summary["test_loss"], abs=1e-5)


@pytest.mark.slow
def test_gradient_accumulation_takes_the_same_steps(small_config: SmallConfig, tmp_path: Path) -> None:
    losses = []
    for accum in (1, 4):
        fit(small_config(exp_name=f"x{accum}", grad_accum=accum, clip_grad=0.5))
        losses.append([row["loss"] for row in read_jsonl(tmp_path / "runs" / f"x{accum}" / "steps.jsonl")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_loss_that_is_no_number_names_the_step(small_config: SmallConfig) -> None:
    with pytest.raises(UserError, match="the loss became (nan|inf) at step") as caught:
        fit(small_config(optimizer="sgd", lr=1e9, schedule="constant", warmup=0))
    message = str(caught.value)
    step = int(re.findall(r"at step (\d+) \(epoch 1, learning rate 1e\+09\)", message)[0])
    session = setup(small_config(), "never", overwrite=False)
    samples = session.train_loader.sample_order(0)[step - 1].flatten().tolist()
    assert message.endswith(f"of that batch, by index: {' '.join(map(str, samples))}")
    assert "there is no checkpoint yet" in message


@pytest.mark.slow
def test_folders_streamed_and_resident_train_alike(small_config: SmallConfig, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "shapes")
    settings = {"dataset": "folder", "data_dir": str(data), "batch_size": 8, "epochs": 2}
    summary = fit(small_config(exp_name="resident", **settings))
    fit(small_config(exp_name="streamed", stream="always", **settings))
    assert same_weights(tmp_path / "runs" / "resident", tmp_path / "runs" / "streamed")
    assert summary["num_classes"] == 2 and summary["dataset"] == "shapes"


@pytest.mark.slow
def test_a_set_smaller_than_a_batch_is_one_batch(small_config: SmallConfig, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "shapes", per_class=5)
    summary = fit(small_config(dataset="folder", data_dir=str(data), batch_size=256))
    assert (summary["batch_size"], summary["steps"]) == (10, 3)


@pytest.mark.slow
def test_one_of_timms_own_models_trains(small_config: SmallConfig, tmp_path: Path) -> None:
    sizes = dict.fromkeys(("embed_dim", "depth", "num_heads", "patch_size"))
    summary = fit(small_config(model="test_resnet", attention="auto", image_size=32, dataset="synthetic", **sizes))
    assert summary["attention"] == "timm" and summary["test_accuracy"] > 0.3
    exported = json.loads((tmp_path / "runs" / "run" / "config.json").read_text())
    assert exported["pretrained_cfg"]["input_size"] == [3, 32, 32]


@pytest.mark.slow
def test_a_run_ends_with_what_it_found_and_the_next_command(
    small_config: SmallConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of zero leaves the model at a constant guess, of a class that may not be the largest."""
    summary = fit(small_config(lr=0, epochs=2, stop_after=1))
    assert summary["majority_share"] == 37 / 359 >= summary["test_accuracy"]
    *_, warning, last = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: the accuracy, ") and "10.31% that always guessing the largest class" in warning
    run = tmp_path / "runs" / "run"
    assert last.startswith(f"written to {run}; next: repeat the command with --resume auto and without --stop-after")
    fit(small_config(lr=0, epochs=2), resume="must")
    log = (run / "train.log").read_text().splitlines()
    assert log[-1] == f"written to {run}; next: fastvit report {run}" and log[-2] == warning
    main(["eval", str(run)])
    assert warning in capsys.readouterr().out


@pytest.mark.slow
def test_curves_and_tables_of_two_runs(small_config: SmallConfig, tmp_path: Path) -> None:
    runs = []
    for model in ("c_vit_4_4_32", "mc_vit_4_4_32"):
        fit(small_config(model=model, exp_name=model, epochs=1))
        runs.append(tmp_path / "runs" / model)
    plot_curves(runs, tmp_path / "curves.png", comparison.dataset_names(read_runs(runs)))
    lines = comparison.markdown_table(read_runs(runs)).splitlines()
    assert lines[0] == "|  | c_vit_4_4_32 | mc_vit_4_4_32 |"
    accuracy = json.loads((runs[1] / "summary.json").read_text())["test_accuracy"]
    assert next(line for line in lines if line.startswith("| accuracy")).endswith(f"| {accuracy:.2%} |")
    plot_curves(runs, tmp_path / "curves.png", r"a$\frac$b_c")
    for content in ("", "{}", "[]", '{"model": 3}'):
        (runs[0] / "summary.json").write_text(content)
        with pytest.raises(UserError, match="is not a finished run|missing or damaged"):
            comparison.table(read_runs(runs))
