"""Words and numbers in messages."""

import io

import pytest
import torch
from rich.console import Console

from fastvit_kernels.autotune.choice import _plain
from fastvit_train.cli.main import main
from fastvit_train.cli.verbs import VERBS
from fastvit_train.runs.train_state import TrainState
from fastvit_train.training.display.progress_bar import ProgressBar
from fastvit_train.utils.errors import counted


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [
        (1, "epoch", "1 epoch"),
        (0, "epoch", "0 epochs"),
        (2, "class", "2 classes"),
        (1, "class", "1 class"),
        (12_000, "micro-batch", "12,000 micro-batches"),
        (3, "local process", "3 local processes"),
        ("1", "epoch", "1 epoch"),
        ("1,000", "image", "1,000 images"),
    ],
)
def test_a_noun_follows_its_number(number: int | str, noun: str, expected: str) -> None:
    assert counted(number, noun) == expected


@pytest.mark.parametrize(
    ("ms", "expected"),
    [(1713.2, "1,710"), (12345.0, "12,300"), (999.9, "1,000"), (17.13, "17.1"), (0.01234, "0.0123"), (0.0, "0")],
)
def test_times_have_no_exponent(ms: float, expected: str) -> None:
    assert _plain(ms) == expected


def test_the_progress_bar_labels_the_time_left() -> None:
    output = io.StringIO()
    bar = ProgressBar(Console(file=output, force_terminal=True, width=200), total_steps=10, epochs=1, processes=1)
    with bar:
        state = TrainState(step=2, step_in_epoch=2, epoch_losses=[1.0, 1.0])
        bar.update(state, torch.ones(10), torch.tensor(3), images_per_step=4)
    assert "ETA" in output.getvalue()


@pytest.mark.parametrize(
    ("verb", "usage"),
    [
        ("eval", "RUN"),
        ("predict", "RUN [IMAGE ...]"),
        ("inspect", "RUN [IMAGE ...]"),
        ("push", "RUN USER/NAME"),
        ("report", "RUN ... [--output PATH] [--data-dir FOLDER]"),
        ("recipes", "[RECIPE]"),
    ],
)
def test_usage_lines_name_their_arguments(capsys: pytest.CaptureFixture[str], verb: str, usage: str) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert capsys.readouterr().out.splitlines()[0].endswith(usage)


@pytest.mark.parametrize("verb", VERBS)
def test_no_usage_line_names_a_type(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert "STR" not in usage and "{None}" not in usage
