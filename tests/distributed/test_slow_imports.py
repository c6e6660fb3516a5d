"""Modules are imported without garbage collection, and what they hold is not looked through again."""

import ast
import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fastvit_train.distributed.slow_imports import slow_imports
from tests.support import ROOT


def test_what_is_imported_is_excluded_from_collections_and_nothing_else() -> None:
    code = """
import gc
from fastvit_train.distributed.slow_imports import slow_imports
with slow_imports():
    assert not gc.isenabled() and not gc.get_freeze_count()
    import wave
assert gc.isenabled() and not any(each is wave.__dict__ for each in gc.get_objects())
excluded, later = gc.get_freeze_count(), [[] for _ in range(10_000)]
with slow_imports():
    import wave
assert excluded > 1_000 and gc.get_freeze_count() == excluded
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("collecting", [False, True])
def test_the_collector_is_left_as_it_was_found_also_by_an_import_that_fails(collecting: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(ImportError), slow_imports():
            raise ImportError
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("name", ["training_verbs.py", "inference_verbs.py"])
def test_verbs_import_what_is_slow_this_way(name: str) -> None:
    tree = ast.parse((ROOT / "fastvit_train" / "cli" / name).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    plain = [each for function in functions for each in imports_outside(function)]
    assert {each.module for each in plain} <= {"fastvit_train.config"}
    assert sum("with slow_imports():" in ast.unparse(function) for function in functions) >= 6


def imports_outside(node: ast.AST) -> Iterator[ast.ImportFrom]:
    """The imports below `node` that are not in a context of slow_imports."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.With) and ast.unparse(child.items[0].context_expr) == "slow_imports()":
            continue
        if isinstance(child, ast.ImportFrom):
            yield child
        yield from imports_outside(child)
