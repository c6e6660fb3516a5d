"""What a sweep searches, and what of it is refused in one line."""

import pytest

pytest.importorskip("optuna")
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from fastvit_train.config.recipes import recipe
from fastvit_train.training.sweep.space import parse
from fastvit_train.utils.errors import UserError

CONFIG = recipe("quickstart")


def test_ranges_and_lists() -> None:
    words = [
        "lr=1e-3..3e-2:log",
        "--embed-dim=16..48",
        "image_size=24..64",
        "warmup=0..0.5",
        "flip=none,random",
        "decay_all=True,False",
    ]
    assert parse([*words, "momentum=0.9,0.95"], CONFIG) == {
        "lr": FloatDistribution(1e-3, 3e-2, log=True),
        "embed_dim": IntDistribution(16, 48),
        "image_size": IntDistribution(24, 64),
        "warmup": FloatDistribution(0, 0.5),
        "flip": CategoricalDistribution(["none", "random"]),
        "decay_all": CategoricalDistribution([True, False]),
        "momentum": CategoricalDistribution(["0.9", "0.95"]),
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lr=3e-2..1e-3", "lr=3e-2..1e-3 is empty; the first number must be below the second"),
        ("lr=1..1", "is empty"),
        ("lr=0..1:log", "a logarithmic range must begin above 0"),
        ("lr=1..2:exp", "'exp' is not a scale; allowed: NAME=LOW..HIGH"),
        ("lr=1..x", "is not a range of two numbers"),
        ("lr=1..2..3", "is not a range of two numbers"),
        ("lr=-1..1", "--lr -1.* is out of range; allowed: at least 0"),
        ("warmup=0..1", "--warmup 1.* is out of range"),
        ("depth=1.5..3", "depth: '?1.5'? in depth=1.5 is not of type int"),
        ("flip=none,sideways", "'sideways' in flip=sideways is not allowed"),
        ("flip=none,none", "leaves nothing to choose; give two values, or the flag --flip"),
        ("lr", "'lr' says no values; allowed: NAME=LOW..HIGH"),
        ("lr=", "says no values"),
        ("learning=1,2", "unknown setting 'learning'"),
        ("epochs=1,2", "all trials must have the same epochs"),
        ("momentum=0.9,0.95", "momentum occurs twice; give it once"),
    ],
)
def test_what_cannot_be_searched_is_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["momentum=0.8..0.9", word], CONFIG)


def test_nothing_to_search_is_refused() -> None:
    with pytest.raises(UserError, match="a sweep needs something to search, as in: sweep lr="):
        parse([], CONFIG)
