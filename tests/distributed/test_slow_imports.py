"""Modules are imported without garbage collection, and what they hold is not looked through again."""

import ast
import gc
import subprocess
import sys

import pytest

from fastvit_train.distributed.slow_imports import slow_imports
from tests.support import ROOT


def test_what_exists_after_an_import_is_excluded_from_collections_and_what_is_made_later_is_not() -> None:
    code = """
import gc
from fastvit_train.distributed.slow_imports import slow_imports

def is_collected(wanted):
    return any(each is wanted for each in gc.get_objects())

with slow_imports():
    assert not gc.isenabled()
    import wave
    assert is_collected(wave.__dict__)
assert gc.isenabled() and not is_collected(wave.__dict__)
later = []
with slow_imports():
    import wave
assert is_collected(later)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("collecting", [False, True])
def test_the_collector_is_restored_even_if_an_import_fails(collecting: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(ImportError), slow_imports():
            raise ImportError
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("name", ["training_verbs.py", "inference_verbs.py"])
def test_verbs_import_what_is_slow_this_way_and_do_nothing_else_meanwhile(name: str) -> None:
    tree = ast.parse((ROOT / "fastvit_train" / "cli" / name).read_text(encoding="utf-8"))
    nodes = [node for function in tree.body if isinstance(function, ast.FunctionDef) for node in ast.walk(function)]
    contexts = [node for node in nodes if isinstance(node, ast.With) and "slow_imports" in ast.unparse(node.items[0])]
    assert contexts
    slow = [statement for context in contexts for statement in context.body]
    assert all(isinstance(statement, ast.ImportFrom) for statement in slow)
    others = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) and node not in slow]
    assert {ast.unparse(node) for node in others} <= {"from fastvit_train.config import settings_file"}
