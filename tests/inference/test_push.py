"""A pushed model arrives byte for byte, is private by default and has a model card; a failure is one line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from timm.models import save_for_hf

from fastvit_train.cli.main import main
from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import recipe
from fastvit_train.inference.model_card import without_paths
from fastvit_train.inference.trained_model import load_run
from tests.inference.fake_hub import TOKEN, FakeHub, fake_hub
from tests.support import environment, one_line_error, write_folder

SMALL = (
    *("--depth", "2", "--embed-dim", "16", "--num-heads", "2", "--patch-size", "8", "--attention", "fused"),
    *("--epochs", "2", "--no-telemetry"),
)
FILES = {"model.safetensors", "config.json", "README.md", "config.yaml", "summary.json", "metrics.jsonl", "curves.png"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("finished")
    main(["--runs-dir", str(runs), "--exp-name", "run", *SMALL])
    return runs / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def push(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The output of `push`."""
    capsys.readouterr()
    main(["push", *map(str, args)])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The error line of `push`, which must exit with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["push", *map(str, args)])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    return one_line_error(printed.err)


def front_matter(readme: str) -> dict:
    return yaml.safe_load(readme.split("---\n")[1])


@pytest.mark.slow
def test_a_run_arrives_byte_for_byte_and_loads_from_there(
    run: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"pushed to {hub.url}/me/digits (private)" in push(capsys, run, "me/digits")
    there = hub.repos["me/digits"]
    assert there.private and set(there.files) == FILES
    for name in ("summary.json", "metrics.jsonl", "curves.png"):
        assert there.files[name] == (run / name).read_bytes()
    settings, own_settings = (
        yaml.safe_load(text) for text in (there.files["config.yaml"], (run / "config.yaml").read_text())
    )
    assert settings == {**own_settings, "runs_dir": Path(own_settings["runs_dir"]).name} != own_settings
    push(capsys, run, "me/digits", "--dry-run")
    assert {path.name: path.read_bytes() for path in (run / "hub").iterdir()} == there.files
    assert len(hub.verified) == 2, "the weights and the picture went as large files"

    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    pushed, own = (load_run(source, device="cpu") for source in ("hf-hub:me/digits", run))
    assert torch.equal(pushed.predict(images), own.predict(images)) and pushed.classes == own.classes
    monkeypatch.chdir(tmp_path)
    main(["export", "hf-hub:me/digits", "--to", "safetensors"])
    assert (tmp_path / "export" / "model.safetensors").is_file()

    readme = there.files["README.md"].decode()
    (example,) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    Image.new("RGB", (40, 32)).save("image.png")
    capsys.readouterr()
    exec(compile(example, "README.md", "exec"), {})
    assert "tensor([[" in capsys.readouterr().out


@pytest.mark.slow
def test_weights_of_an_earlier_end_are_not_pushed(run: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    """The run was extended, and trains on."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**last, "epoch": last["epoch"] + 1}) + "\n")
    message = refused(capsys, run, "me/digits")
    assert re.search("run has trained on since its final weights were written; .* --checkpoint best or last$", message)
    assert not hub.repos
    push(capsys, run, "me/digits", "--checkpoint", "last")


def test_the_model_card_describes_the_run(run: Path, capsys: pytest.CaptureFixture[str], hub: FakeHub) -> None:
    assert f"written to {run}/hub; nothing was sent" in push(
        capsys, run, "me/digits", "--dry-run", "--license", "apache-2.0"
    )
    assert not hub.requests
    readme = (run / "hub" / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    front = front_matter(readme)
    assert (front["library_name"], front["pipeline_tag"]) == ("timm", "image-classification")
    assert front["license"] == "apache-2.0" and front["metrics"] == ["accuracy"] and "datasets" not in front
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "digits", "type": "digits", "split": "test"}
    assert result["metrics"][0]["value"] == pytest.approx(summary["test_accuracy"], abs=1e-6)
    for words in (
        "`mc_vit_4_4_32`", f"parameters: {summary['parameters']:,}", "32 x 32 pixels", "| embed_dim | default | 16 |",
        "| epochs | 30 | 2 |", f"| accuracy | {summary['test_accuracy']:.2%} |", "chosen on the same images",
        "training time", "| device |", "for an image of something else", "--config config.yaml", "hf-hub:me/digits",
    ):  # fmt: skip
        assert words in readme, words
    assert "held" not in readme and str(run.parent) not in readme


def test_nothing_that_is_published_names_a_folder_of_this_machine(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    private = {
        "weights": str(tmp_path / "secret" / "model.safetensors"), "class_weights": str(tmp_path / "secret" / "w.json"),
        "data_dir": "../secret/photos", "data_url": f"file://{tmp_path}/secret/digits.tar.gz",
    }  # fmt: skip
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, **private}))
    push(capsys, run, "me/digits", "--dry-run")
    for path in (run / "hub").iterdir():
        assert b"secret" not in path.read_bytes(), path
    published = yaml.safe_load((run / "hub" / "config.yaml").read_text())
    assert {key: published[key] for key in private} == {
        "weights": "initial-model.safetensors", "class_weights": "w.json", "data_dir": "photos", "data_url": None
    }  # fmt: skip


def test_published_names_of_data_sets_and_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "animals").mkdir()
    monkeypatch.chdir(tmp_path / "animals")
    names = {"/gone/secret/birds": "birds", str(tmp_path / "animals"): "animals", ".": "animals", "../x/fish": "fish"}
    for name, expected in {**names, "me/animals": "me/animals"}.items():
        assert without_paths(override(recipe("quickstart"), {"dataset": f"hf:{name}"}, "the test")).data.dataset == (
            f"hf:{expected}"
        )
    start = {"init_from": "secret/base", "weights": "secret/base/model.safetensors"}
    model = without_paths(override(recipe("quickstart"), start, "the test")).model
    assert (model.init_from, model.weights) == ("base", None)


@pytest.mark.parametrize(
    ("weights", "name"), [("best epoch", "the best epoch"), ("average", "the average of the last epochs' weights")]
)
def test_the_model_card_says_which_weights_the_accuracy_is_of(
    weights: str, name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "final_weights": weights}))
    push(capsys, run, "me/digits", "--dry-run")
    readme = (run / "hub" / "README.md").read_text()
    assert front_matter(readme)["model-index"][0]["results"][0]["metrics"][0]["name"] == f"accuracy of {name}"
    assert f"The accuracy is that of {name}, on the test set." in readme and "of the last epoch," not in readme
    assert ("The best epoch was chosen on these images" in readme) == (weights == "best epoch")


def test_the_model_card_mentions_a_holdout_and_escapes_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hub: FakeHub
) -> None:
    photos = write_folder(tmp_path / "<b>photos|`", classes=("[a](http:x)", "<img src=x>"))
    data = ("--dataset", "folder", "--data-dir", str(photos), "--holdout", "0.25")
    main(["--runs-dir", str(tmp_path), "--exp-name", "run", *data, *SMALL])
    push(capsys, tmp_path / "run", "me/photos", "--dry-run")
    readme = (tmp_path / "run" / "hub" / "README.md").read_text()
    front = front_matter(readme)
    assert front["model-index"][0]["results"][0]["dataset"]["split"] == "holdout"
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == "<b>photos|`"
    assert "license" not in front
    body = readme.split("---\n", 2)[2]
    assert "25% of it was held out" in body and "not for the test set" in body
    assert r"\<b\>photos\|\`" in body and r"\<img src=x\>, \[a\](http:x)" in body
    assert not re.search(r"(?<!\\)<(b|img)", body)


def test_the_model_card_of_a_model_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hub: FakeHub
) -> None:
    save_for_hf(timm.create_model("mc_vit_4_4_32", depth=1), str(tmp_path / "theirs"), safe_serialization=True)
    push(capsys, tmp_path / "theirs", "me/theirs", "--public")
    there = hub.repos["me/theirs"]
    assert not there.private and set(there.files) == {"model.safetensors", "config.json", "README.md"}
    readme = there.files["README.md"].decode()
    assert (
        "Its training data, recipe and accuracy are unknown" in readme
        and "model-index" not in readme
        and "accuracy |" not in readme
    )
    assert load_run("hf-hub:me/theirs").architecture == "mc_vit_4_4_32"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("digits",), "digits is not of the form USER/NAME"),
        (("me/a/b",), "me/a/b"),
        (("me/a b",), "me/a b"),
        (("me/..",), r"me/\.\."),
        (("me/x", "--license", "My own"), "--license 'My own' is not a license identifier"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_sent(
    args: tuple[str, ...], message: str, run: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, refused(capsys, run, *args))
    assert not hub.requests


def test_nothing_is_sent_without_a_token_or_a_model(
    run: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is not a run" in refused(capsys, "nowhere", "me/digits")
    (run / "metrics.jsonl").rename(run / "elsewhere")
    assert "is not a finished run" in refused(capsys, run, "me/digits")
    (run / "metrics.jsonl").symlink_to(run / "elsewhere")
    assert "metrics.jsonl is a symbolic link" in refused(capsys, run, "me/digits")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "push runs in one process" in refused(capsys, run, "me/digits")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("HF_TOKEN")
    assert "`hf auth login`" in refused(capsys, run, "me/digits")
    assert not hub.requests


def test_a_public_repository_is_not_pushed_to_by_accident(
    run: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    push(capsys, run, "me/digits", "--public")
    hub.repos["me/digits"].files.clear()
    assert "me/digits exists and is public; give --public" in refused(capsys, run, "me/digits")
    assert not hub.repos["me/digits"].files
    assert "(public)" in push(capsys, run, "me/digits", "--public")
    assert set(hub.repos["me/digits"].files) == FILES


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/commit/", 403, "the token has no write access to it; log in with `hf auth login`"),
        ("/commit/", 409, "another commit is in progress; push again"),
        ("/commit/", 500, r"push again later \(HTTP status 500"),
        ("/storage/", 403, "the token has no write access"),
        ("/repos/create", 401, "the token is not valid; log in with `hf auth login`"),
    ],
)
def test_an_error_of_the_hub_is_one_line(
    path: str, status: int, message: str, run: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.failing[path] = status
    before = sorted(run.rglob("*"))
    assert re.search(f"{hub.url} did not accept me/digits: {message}", refused(capsys, run, "me/digits"))
    assert sorted(run.rglob("*")) == before
    assert "me/digits" not in hub.repos or not hub.repos["me/digits"].files


def test_an_unreachable_hub_is_one_line(
    run: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 did not accept me/digits" in refused(capsys, run, "me/digits")


@pytest.mark.slow
def test_as_users_set_it_up(run: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_TOKEN are all that a user sets."""
    with fake_hub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        off = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-m", "fastvit_train"]
        for args in (["push", str(run), "me/digits"], ["eval", "hf-hub:me/digits", "--dataset", "digits"]):
            done = subprocess.run(
                [*command, *args], cwd=tmp_path, env=environment(**settings, **off), capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
        assert set(hub.repos["me/digits"].files) == FILES
        bad = {**settings, "HF_TOKEN": "hf_other"}
        done = subprocess.run(
            [*command, "push", str(run), "me/other"], env=environment(**bad, **off), capture_output=True, text=True
        )
        assert done.returncode == 2 and "the token is not valid" in one_line_error(done.stderr)
