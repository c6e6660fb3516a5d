"""The classes in training: weights in the loss, balanced samples, and stratified batches."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import one_hot

from fastvit_train.data.balance import class_weights, draw_balanced, stratified_order
from fastvit_train.utils.errors import UserError

LABELS = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
NAMES = ("cat", "dog", "owl")


def test_auto_weights_give_each_class_the_same_sum_and_keep_the_mean(seed: int) -> None:
    weights = class_weights("auto", LABELS, NAMES, 3)
    sums = torch.zeros(3).index_add_(0, LABELS, weights[LABELS])
    torch.testing.assert_close(sums, torch.full((3,), 100 / 3))
    assert class_weights("auto", LABELS, NAMES, 5)[3:].tolist() == [1, 1]  # outputs without a class
    assert class_weights("auto", LABELS, (*NAMES, "yak"), 4)[3] == 1  # without an image: smoothed labels have it too


def test_weights_of_a_file_keep_their_proportions(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"owl": 4, "cat": 1, "dog": 2.0}))
    weights = class_weights(str(path), LABELS, NAMES, 3)
    torch.testing.assert_close(weights / weights[0], torch.tensor([1.0, 2.0, 4.0]))
    assert weights[LABELS].mean().item() == pytest.approx(1)
    drawn = class_weights(str(path), LABELS, NAMES, 3, balanced=True)  # as often from each class
    torch.testing.assert_close(drawn, torch.tensor([3 / 7, 6 / 7, 12 / 7]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read (No such file or directory); allowed: auto, or a file"),
        ("cat: 1", "is not JSON"),
        ("[1, 2, 3]", 'it holds a weight for each class, as in {"cat": 1.5, "dog": 1.5}'),
        ('{"cat": 1, "dog": 2}', "does not name the classes of the data set (without 'owl')"),
        ('{"cat": 1, "dog": 2, "owl": 1, "cow": 1}', "(with 'cow')"),
        ('{"cat": 1, "dog": 2, "owl": 0}', "'owl' has the weight 0; allowed: numbers above 0"),
        ('{"cat": 1, "dog": 2, "owl": "many"}', "'owl' has the weight 'many'"),
        ('{"cat": 1, "dog": 2, "owl": true}', "'owl' has the weight True"),
        ('{"cat": 1, "dog": 2, "owl": Infinity}', "weights.json"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        class_weights(str(path), LABELS, NAMES, 3)
    assert message in str(error.value) and "--class-weights" in str(error.value)


def test_balanced_samples_are_equally_many_of_each_class_and_repeat_no_more_than_they_must(seed: int) -> None:
    drawn = draw_balanced(LABELS, torch.Generator().manual_seed(seed))
    counts = LABELS[drawn].bincount()
    assert len(drawn) == 100 and counts.max() - counts.min() <= 1
    times = drawn.bincount(minlength=100)
    assert times[:60].max() == 1 and times[60:90].max() <= 2
    assert times[90:].min() == 3 and times[90:].max() == 4
    assert not torch.equal(drawn, draw_balanced(LABELS, torch.Generator().manual_seed(seed + 1)))


def test_any_stretch_of_a_stratified_order_has_the_share_of_each_class(seed: int) -> None:
    labels = torch.tensor([0] * 400 + [1] * 90 + [3] * 10)[torch.randperm(500)]
    order = stratified_order(labels, torch.Generator().manual_seed(seed))
    assert torch.equal(order.sort().values, torch.arange(500))
    seen = torch.cat((torch.zeros(1, 4), one_hot(labels[order], 4).cumsum(0)))
    shares = torch.tensor([0.8, 0.18, 0.0, 0.02])
    assert (seen[50:] - seen[:-50] - 50 * shares).abs().max() <= 3, "4 to 11 if the order is random"
    again = stratified_order(labels, torch.Generator().manual_seed(seed + 1))
    assert not torch.equal(labels[order], labels[again]) and not torch.equal(order, again)
    pairs = order[labels[order] == 3], again[labels[again] == 3]
    assert not torch.equal(*pairs), "the order within a class is not random"
