"""The package as a library."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvit_train
from fastvit_train.utils.errors import UserError

SMALL = {"epochs": 1, "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "attention": "fused"}


@pytest.mark.slow
def test_train_evaluate_load_run(tmp_path: Path) -> None:
    summary = fastvit_train.train("quickstart", **SMALL, runs_dir=str(tmp_path), exp_name="run")
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    result = fastvit_train.evaluate(tmp_path / "run")
    assert result.accuracy == summary["test_accuracy"] and result.samples == 359
    run = fastvit_train.load_run(tmp_path / "run")
    test = run.dataset().test
    probabilities = run.predict(test.images)
    assert probabilities.shape == (359, 10) and torch.allclose(probabilities.sum(1), torch.ones(359), atol=1e-5)
    assert probabilities.argmax(1).equal(result.predicted)
    for wrong in (test.images[0], test.images[:2, :1]):
        with pytest.raises(UserError, match=re.escape(f"images of shape {tuple(wrong.shape)} do not fit")):
            run.predict(wrong)
    assert run.classes == tuple("0123456789") and run.parameters == summary["parameters"]
    assert (
        fastvit_train.train(**SMALL, runs_dir=str(tmp_path), exp_name="run", resume="must")["steps"] == summary["steps"]
    )


def test_mistakes_are_exceptions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown key 'epoch' in train\\(\\); did you mean epochs"):
        fastvit_train.train(epoch=3, runs_dir=str(tmp_path))
    with pytest.raises(UserError, match="unknown recipe 'quick'"):
        fastvit_train.train("quick")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train", "evaluate", "load_run"])
def test_calls_are_documented_and_typed(name: str) -> None:
    call = getattr(fastvit_train, name)
    assert "Args:" in call.__doc__ and "Raises:" in call.__doc__
    assert all(p.annotation is not p.empty for p in inspect.signature(call).parameters.values())


@pytest.mark.slow
def test_the_public_functions_stay_functions_after_other_imports() -> None:
    """`fastvit_train.evaluate` stays the function, not the module `inference.evaluate`."""
    code = """
import fastvit_train.inference.evaluate, fastvit_train.training.loop, fastvit_train.cli.main
from fastvit_train import evaluate, train
from fastvit_train.training.loop import fit
print(callable(evaluate), callable(train), callable(fit))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "True True True\n"
