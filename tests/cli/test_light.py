"""Help and mistakes are answered without torch; our models are registered with timm whatever is imported first."""

import json
import subprocess
import sys

import pytest

from fastvit_train.config import names
from fastvit_train.models import OUR_MODELS
from fastvit_train.models.attention import attentions

HEAVY = ("torch", "torchvision", "timm", "matplotlib", "accelerate", "fastvit_kernels")
REPORT = f"import json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


def imported(code: str) -> list[str]:
    """The heavy packages that a fresh interpreter has imported after `code`."""
    program = f"import sys\n{code}\n{REPORT}"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["plan", "--help"],
        ["eval", "--help"],
        ["push", "--help"],
        ["watch", "--help"],
        ["recipes", "--help"],
        ["trian"],
        ["--epoch", "3"],
        ["--dataset", "mnist"],
        ["--epochs", "x"],
        ["--recipe", "fast"],
        ["--attention", "sdp"],
        ["eval", "runs/a", "--attention", "sdp"],
        ["recipes", "fast"],
        ["completion", "bsh"],
        ["push", "runs/a"],
    ],
    ids=" ".join,
)
def test_help_and_typos_do_not_import_torch(arguments: list[str]) -> None:
    code = f"""
from fastvit_train.cli.main import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert stop.code in (0, None, 2)
"""
    assert imported(code) == []


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported("import fastvit_train; assert 'train' in dir(fastvit_train)") == []


ORDERS = {
    "slow": [
        "import fastvit_train; import timm",
        "import timm; import fastvit_train",
        "import fastvit_train; fastvit_train.models",
    ],
    "soak": [
        "import fastvit_train; from timm import create_model",
        "import fastvit_train; import timm.models",
        "import fastvit_train.models; import timm",
        "import fastvit_train, importlib.util; importlib.util.find_spec('timm'); import timm",
    ],
}
"""by the tier that tries them"""


@pytest.mark.parametrize(
    "code", [pytest.param(code, marks=getattr(pytest.mark, tier)) for tier, codes in ORDERS.items() for code in codes]
)
def test_our_models_are_registered_in_either_order(code: str) -> None:
    assert "timm" in imported(f"{code}\nimport timm; assert timm.create_model('mc_vit_4_4_32').num_classes == 10")


@pytest.mark.slow
def test_the_public_names_are_what_they_were() -> None:
    code = """
import fastvit_train
from fastvit_train import Evaluation, TrainedModel, evaluate, load_run, models, train
assert callable(train) and callable(evaluate) and models.OUR_MODELS
try:
    fastvit_train.missing
except AttributeError as error:
    assert "missing" in str(error)
else:
    raise AssertionError
"""
    assert "torch" in imported(code)


def test_the_listed_names_are_those_that_exist() -> None:
    assert list(names.MODELS) == OUR_MODELS
    assert list(names.ATTENTIONS) == attentions()
