"""The page of a report: results match the summary, hostile names are plain text, and gaps have their reasons."""

import base64
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit_train.cli.main import main
from fastvit_train.cli.parser import parse
from fastvit_train.cli.training_verbs import Train
from fastvit_train.config.overrides import flatten
from fastvit_train.inference.report.page import write_report
from fastvit_train.inference.trained_model import load_run
from fastvit_train.runs.run_folder import RunFolder
from tests.support import one_line_error, write_folder

SMALL = (
    *("--depth", "1", "--embed-dim", "16", "--num-heads", "2", "--patch-size", "8", "--attention", "fused"),
    *("--batch-size", "240", "--no-telemetry"),
)
MISTAKE = r"true ?(\d) ?predicted ?(\d) ?confidence ?([\d.]+%)"
CLASSES = ("<script>document.title = 'stolen'<", "square & co", "tri\"angle'")


class Page(HTMLParser):
    """The tables of a page by their captions, its elements and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._rows: list[list[str]] = []
        self._into: list[str] = []
        self._caption = ""
        self._open: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass  # void elements have no end tag
        if tag == "table":
            self.tables.setdefault(" ".join(self._caption.split()), self._rows)

    def handle_data(self, data: str) -> None:
        if "style" not in self._open and "script" not in self._open:
            self.text += data
        if "caption" in self._open:
            self._caption += data
        elif "td" in self._open or "th" in self._open:
            self._rows[-1][-1] += data

    def table(self, caption: str) -> dict[str, list[str]]:
        """The rows of the first table whose caption contains `caption`, by their first cell."""
        rows = next(rows for name, rows in self.tables.items() if caption in name)
        cells = [[" ".join(cell.split()) for cell in row] for row in rows]
        return {name: rest for name, *rest in cells}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small runs on the digits, and one on a folder with hostile names."""
    root = tmp_path_factory.mktemp("report")
    data = write_folder(root / "data", classes=CLASSES)
    (root / "data" / "train" / CLASSES[1] / "0.png").rename(root / "data" / "train" / CLASSES[1] / "<i>.png")
    for name, *flags in (
        ("c", "--model", "c_vit_4_4_32", "--epochs", "3"),
        ("mc", "--epochs", "3", "--lr", "0.003", "--label-smoothing", "0.1", "--qkv-bias", "False"),
        ("<script>alert(1)", "--epochs", "1", "--dataset", "folder", "--data-dir", str(data)),
    ):
        main(["--runs-dir", str(root / "runs"), "--exp-name", name, *SMALL, *flags])
    return root / "runs"


def report(tmp_path: Path, *sources: object) -> Page:
    return Page(write_report([str(source) for source in sources], tmp_path / "page.html"))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_the_results_of_two_runs_match_their_summaries(runs: Path, tmp_path: Path) -> None:
    page = report(tmp_path, runs / "c", runs / "mc")
    rows, both = page.table("From summary.json"), [summary(runs / name) for name in ("c", "mc")]
    assert rows["result"] == ["c", "mc", "difference"]
    assert rows["accuracy"][:2] == [f"{s['test_accuracy']:.2%}" for s in both]
    assert rows["test loss"][:2] == [f"{s['test_loss']:.4f}" for s in both]
    assert rows["parameters"][:2] == [f"{s['parameters']:,}" for s in both]
    assert rows["peak memory, MiB"][:2] == [f"{s['peak_memory_mib']:,.0f}" for s in both]
    assert rows["energy, J"][:2] == rows["energy per image, mJ"][:2]
    assert rows["energy, J"][:2] == [f"— {s['energy_unmeasured']}" for s in both]
    gap = 100 * (both[1]["test_accuracy"] - both[0]["test_accuracy"])
    assert rows["accuracy"][2] == f"{gap:+.2f} points"
    assert f"{abs(gap):.2f} percentage points more accurate" in page.text
    assert f"{round(abs(gap) / 100 * 359)} of 359 images" in page.text


def test_the_tables_below_the_curves_match_the_metrics(runs: Path, tmp_path: Path) -> None:
    page = report(tmp_path, runs / "c", runs / "mc")
    metrics = [
        [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()] for name in ("c", "mc")
    ]
    for number, epochs in enumerate(zip(*metrics, strict=True), start=1):
        for title, show in (("train_loss", "{:.4f}"), ("test_loss", "{:.4f}"), ("test_accuracy", "{:.2%}")):
            caption = {"train_loss": "train loss by", "test_loss": "test loss by", "test_accuracy": "accuracy, % by"}
            assert page.table(caption[title])[str(number)] == [show.format(row[title]) for row in epochs]


def test_the_evaluation_is_shown_with_its_images(runs: Path, tmp_path: Path) -> None:
    page = report(tmp_path, runs / "mc")
    confusion = [
        list(map(int, row))
        for name, row in page.table("predicted class (column)").items()
        if name != "true \\ predicted"
    ]
    correct = sum(row[i] for i, row in enumerate(confusion))
    assert sum(map(sum, confusion)) == 359 and correct == round(summary(runs / "mc")["test_accuracy"] * 359)
    assert page.table("By class")["3"][2] == f"{confusion[3][3] / sum(confusion[3]):.2%}"
    images = [attrs for tag, attrs in page.elements if tag == "img"]
    assert len(images) == 12 + 3 * 6
    for image in images:
        with Image.open(BytesIO(base64.b64decode(str(image["src"]).partition(",")[2]))) as picture:
            assert len(picture.getcolors(2**16) or []) > 1, f"{image['alt']} is blank"
    lines = [
        attrs["d"] for tag, attrs in page.elements if tag == "path" and str(attrs.get("class")).startswith("line ")
    ]
    assert sum(str(line).count("L") for line in lines) >= 3 * 2, "three charts of three epochs each"
    assert all(attrs["alt"] and str(attrs["src"]).startswith("data:image/png;base64,") for attrs in images)
    assert "fp32" in page.text and "as in summary.json" in page.text and "pooling weights" in page.text


def test_the_mistakes_are_the_most_confident_ones(runs: Path, tmp_path: Path) -> None:
    page, loaded = report(tmp_path, runs / "mc"), load_run(runs / "mc")
    test = loaded.dataset().test
    assert isinstance(test.images, torch.Tensor)
    confidence, predicted = loaded.predict(test.images).max(1)
    wrong = torch.where(predicted == test.labels, 0, confidence).topk(12)
    captions = [
        (int(true), int(label), share) for true, label, share in re.findall(MISTAKE, " ".join(page.text.split()))
    ]
    expected = [
        (int(test.labels[i]), int(predicted[i]), f"{value:.1%}")
        for value, i in zip(*map(torch.Tensor.tolist, wrong), strict=True)
    ]
    assert captions == expected
    first = next(str(attrs["src"]) for tag, attrs in page.elements if tag == "img")
    shown = np.array(Image.open(BytesIO(base64.b64decode(first.partition(",")[2]))))
    assert (shown[::4, ::4] == test.images[wrong.indices[0]].permute(1, 2, 0).numpy()).all()


def test_settings_that_differ_are_marked(runs: Path, tmp_path: Path) -> None:
    rows = report(tmp_path, runs / "c", runs / "mc").table("config.yaml that differ")
    assert set(rows) == {"setting", "model", "lr", "label_smoothing", "qkv_bias"}
    assert rows["lr"] == ["0.006", "≠ differs: 0.003"]
    alone = report(tmp_path, runs / "mc").table("config.yaml that differ")
    assert alone["setting"] == ["recipe quickstart", "mc"]
    assert alone["lr"] == ["0.006", "≠ differs: 0.003"] and "model" not in alone


@pytest.mark.parametrize("name", ["c", "mc"])
def test_the_commands_repeat_the_run(runs: Path, tmp_path: Path, name: str) -> None:
    text = report(tmp_path, runs / name).text
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("accelerate launch")]
    assert len(lines) == 2
    for words in lines:
        parsed = flatten(parse("train", Train, words[words.index("fastvit_train") + 1 :]).training)
        again = {key: list(value) if isinstance(value, tuple) else value for key, value in parsed.items()}
        recorded = RunFolder(runs / name).read_config()
        moved = {"exp_name": "again", "runs_dir": again["runs_dir"], "image_size": again["image_size"]}
        assert again == {**recorded, **moved}


def test_the_commands_repeat_the_launch(runs: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(runs / "c", tmp_path / "copy")
    (copy / "summary.json").write_text(json.dumps({**summary(copy), "mixed_precision": "bf16", "world_size": 4}))
    start = "accelerate launch --mixed_precision bf16 --multi_gpu --num_processes 4 -m fastvit_train --"
    assert report(tmp_path, copy).text.count(start) == 2


def test_the_page_begins_with_the_accuracy(runs: Path, tmp_path: Path) -> None:
    text = " ".join(report(tmp_path, runs / "c").text.split())
    title, accuracy = "Report on c Skip to the content Report on c ", f"{summary(runs / 'c')['test_accuracy']:.2%}"
    assert text.startswith(f"{title}{accuracy} c: accuracy on digits; c_vit_4_4_32, ")


def test_findings_are_on_the_page(runs: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(runs / "c", tmp_path / "copy")
    for accuracy, is_found in ((0.1, True), (0.9, False)):
        (copy / "summary.json").write_text(json.dumps({**summary(copy), "test_accuracy": accuracy}))
        text = report(tmp_path, copy).text
        assert ("copy: the accuracy, 10.00%, is not above the 10.31% that always guessing" in text) == is_found


def test_hostile_names_are_text(runs: Path, tmp_path: Path) -> None:
    page = report(tmp_path, runs / "<script>alert(1)", runs / "c")
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not {"i", "b"} & {tag for tag, _ in page.elements}
    assert "<script>alert(1)" in page.text and set(CLASSES) <= set(page.table("By class"))
    policy = next(attrs["content"] for tag, attrs in page.elements if "http-equiv" in attrs)
    assert policy and policy.startswith("default-src 'none'; img-src data:;")


def test_hostile_values_are_shown_as_text_or_left_out(runs: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(runs / "c", tmp_path / "copy")
    hostile = {"device": "<script>", "versions": {"<b>": "<i>"}, "test_loss": "0", "energy_unmeasured": "<img src=x>"}
    (copy / "summary.json").write_text(json.dumps({**summary(copy), **hostile}))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "train_loss": NaN, "test_loss": 1e300, "test_accuracy": "</script>"}\n')
        file.write('{"epoch": 1e9, "train_loss": 1}\n{"epoch": 4, "train_loss": 1}\n')
    page = report(tmp_path, copy)
    assert not {"b", "i"} & {tag for tag, _ in page.elements}
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert page.table("From summary.json")["test loss"] == ["— not recorded"]
    assert page.table("train loss by")["4"] == ["1.0000"]


def test_a_model_without_a_run_has_a_page(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(runs / "mc" / name, folder)
    page = report(tmp_path, f"local-dir:{folder}")
    assert page.table("Properties of the models")["parameters"] == [f"{summary(runs / 'mc')['parameters']:,}"]
    assert "has no config.yaml, metrics.jsonl or summary.json" in page.text
    assert "does not record a data set" in page.text


@pytest.mark.slow
def test_many_classes_and_a_model_without_attention(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", per_class=2, classes=tuple(f"class {i:02}" for i in range(32)))
    flags = ("--model", "resnet10t", "--epochs", "1", "--dataset", "folder", "--data-dir", data, "--image-size", "32")
    main(["--runs-dir", str(tmp_path), "--exp-name", "many", "--no-telemetry", *map(str, flags)])
    page = report(tmp_path, tmp_path / "many")
    assert "A matrix of 32 classes would not be legible" in page.text
    assert len(page.table("The 20 of 32 classes with the lowest recall")) == 21
    assert page.table("Most frequent confusions") and "ResNet is not a plain vision transformer" in page.text


def test_a_missing_data_set_is_reported_on_the_page(runs: Path, tmp_path: Path) -> None:
    hostile = runs / "<script>alert(1)"
    path = write_report([str(hostile)], tmp_path / "page.html", data_dir=str(tmp_path / "gone"))
    page = Page(path)
    assert re.search("No evaluation: --data-dir .*gone is not a folder", page.text)
    assert page.table("From summary.json")["accuracy"] == [f"{summary(hostile)['test_accuracy']:.2%}"]
    assert not [tag for tag, _ in page.elements if tag == "img"]


def test_a_run_that_goes_on_is_shown_without_its_earlier_weights(runs: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(runs / "c", tmp_path / "copy")
    last = json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])
    with (copy / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({**last, "epoch": 4, "test_accuracy": 0.5}) + "\n")
    page = report(tmp_path, copy)
    assert "No evaluation: the run is not finished" in page.text and "the results after 4 of 3 epochs" in page.text
    assert page.table("or so far")["accuracy"] == ["50.00%"]


def test_an_accuracy_that_differs_from_the_summary_is_reported(runs: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(runs / "c", tmp_path / "copy")
    changed = {**summary(copy), "test_accuracy": summary(copy)["test_accuracy"] + 2 / 359, "mixed_precision": "bf16"}
    (copy / "summary.json").write_text(json.dumps(changed))
    page = report(tmp_path, copy)
    assert "copy: the accuracy differs." in page.text
    assert f"but summary.json has {changed['test_accuracy']:.2%}, computed in bf16" in page.text


def test_ids_are_unique_and_links_have_targets(runs: Path, tmp_path: Path) -> None:
    page = report(tmp_path, runs / "c", runs / "c")
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    links = [str(attrs["href"]) for tag, attrs in page.elements if tag == "a"]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    labelled = [str(attrs["aria-labelledby"]).split() for _, attrs in page.elements if "aria-labelledby" in attrs]
    assert {name for names in labelled for name in names} <= set(ids)
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.elements if tag == "th")


def mistake(capsys: pytest.CaptureFixture[str], args: Sequence[object]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["report", *map(str, args)])
    assert stop.value.code == 2
    return one_line_error(capsys.readouterr().err)


def test_mistakes_leave_nothing_behind(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "report takes one or more runs" in mistake(capsys, [])
    assert "nowhere is not a run; allowed: " in mistake(capsys, [runs / "c", "nowhere"])
    wrong = mistake(capsys, [runs / "c", "--output", "/dev/null/page.html"])
    assert "/dev/null/page.html cannot be written; choose another --output" in wrong
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "report" in mistake(capsys, [runs / "c"])
    assert not list(tmp_path.iterdir())


def test_the_page_goes_into_the_first_runs_folder(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(runs / "c"), str(runs / "mc")])
    assert f"written to {runs / 'c' / 'report.html'}" in capsys.readouterr().out
    assert (runs / "c" / "report.html").is_file()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null"])
def test_a_summary_with_nan_inf_or_null_is_still_reported(runs: Path, tmp_path: Path, value: str) -> None:
    shutil.copytree(runs / "c", tmp_path / "damaged")
    summary = tmp_path / "damaged" / "summary.json"
    accuracy = json.loads(summary.read_text())["test_accuracy"]
    summary.write_text(summary.read_text().replace(f'"test_accuracy": {accuracy}', f'"test_accuracy": {value}'))
    report(tmp_path, tmp_path / "damaged", runs / "mc")
