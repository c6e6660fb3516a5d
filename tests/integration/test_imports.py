"""Imports run one way, in the order that docs/architecture.md draws, and kernels/ stays a plain folder."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastvit_train"
LEVELS = (
    {"cli"},
    {"inference", "profiling"},
    {"training"},
    {"models"},
    {"runs", "data"},
    {"config", "distributed"},
    {"utils"},
)
"""Packages from the top down: a module imports its own package and those on lower lines."""
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}
FORBIDDEN = {("inference", "training")}
"""Further imports that are not allowed: loading a model must not bring locks, signal handlers and GPU monitoring."""
KNOWN: set[tuple[str, str]] = set()
"""Violations, as (module, imported module), that are still to be removed."""
MAX_ENTRIES = 13  # what `ls fastvit_train` prints
MAX_FILES_PER_PACKAGE = 12
MODULES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """The absolute names of what a file imports anywhere, also in functions, but not if only a type checker does."""
    names = set()
    for node in running_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node`, without the bodies of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from (each for other in child.orelse for each in (other, *running_nodes(other)))
        else:
            yield child
            yield from running_nodes(child)


def top_levels(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def package_of(module: str) -> str:
    """The package of a module of ours; "" for fastvit_train itself and its __main__."""
    package = module.split(".")[1] if "." in module else ""
    return package if package in LEVEL_OF else ""


def violations(path: Path) -> set[tuple[str, str]]:
    """What `path` imports although the order does not allow it."""
    source = package_of(module_name(path))
    if not source:  # fastvit_train/__init__.py and __main__.py offer what all packages have
        return set()
    ours = {name for name in imported(path) if name.startswith("fastvit_train.") and package_of(name)}
    wrong = {name for name in ours if not allowed(source, package_of(name))}
    return {(module_name(path), name) for name in wrong}


def allowed(source: str, target: str) -> bool:
    if (source, target) in FORBIDDEN:
        return False
    return source == target or LEVEL_OF[source] < LEVEL_OF[target]


def test_the_order_names_every_package() -> None:
    assert {path.name for path in PACKAGES if path.parent == PACKAGE} == set(LEVEL_OF)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_only_packages_below_its_own(path: Path) -> None:
    assert violations(path) <= KNOWN


def test_known_violations_are_still_there() -> None:
    assert set().union(*map(violations, MODULES)) >= KNOWN, "an entry of KNOWN is out of date: remove it"


@pytest.mark.parametrize(
    ("source", "line", "wrong"),
    [
        ("runs/lock.py", "from fastvit_train.training.loop import fit", True),
        ("runs/lock.py", "from fastvit_train import training", True),
        ("runs/lock.py", "import fastvit_train.data.loader", True),
        ("runs/lock.py", "def f():\n    import fastvit_train.models", True),
        ("runs/lock.py", "import importlib; importlib.import_module('fastvit_train.training')", True),
        ("runs/lock.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fastvit_train.models", False),
        ("runs/lock.py", "from fastvit_train.config.schema import TrainConfig", False),
        ("inference/push.py", "from fastvit_train.training.loop import fit", True),
        ("inference/push.py", "from fastvit_train.profiling.short_run import x", True),
        ("profiling/estimate.py", "from fastvit_train.inference import evaluate", True),
        ("profiling/estimate.py", "from fastvit_train.training.setup import setup", False),
    ],
)
def test_an_import_against_the_order_is_noticed(
    source: str, line: str, wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "fastvit_train" / source
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert bool(violations(path)) == wrong


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_models_import_the_kernels_and_nothing_imports_bench_or_tests(path: Path) -> None:
    assert not top_levels(path) & {"bench", "tests"}
    if package_of(module_name(path)) != "models":
        assert "fastvit_kernels" not in top_levels(path)


def test_only_the_command_line_knows_the_parser() -> None:
    users = {package_of(module_name(path)) for path in MODULES if top_levels(path) & {"tyro", "argparse"}}
    assert users == {"cli"}


def test_a_newcomer_sees_few_entries() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MAX_ENTRIES, entries


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_package_holds_few_files(folder: Path) -> None:
    files = [path.name for path in folder.iterdir() if path.is_file()]
    assert len(files) <= MAX_FILES_PER_PACKAGE, files


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: path.name)
def test_kernels_know_torch_alone(path: Path) -> None:
    assert top_levels(path) <= {"torch", "triton", "fastvit_kernels", *sys.stdlib_module_names}


def test_kernels_is_a_folder_not_a_package() -> None:
    assert not list((ROOT / "kernels").glob("*.py"))


@pytest.mark.slow
def test_the_operator_works_with_nothing_of_ours_around_it() -> None:
    code = """
import sys
sys.modules["fastvit_train"] = sys.modules["timm"] = sys.modules["accelerate"] = None  # importing them fails
import torch, fastvit_kernels
print(fastvit_kernels.attention(torch.ones(1, 2, 4), torch.ones(12, 4), None, 2, implementation="fused").sum())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "tensor(32.)\n"


def test_another_package_may_be_called_kernels(tmp_path: Path) -> None:
    """The one on PyPI is, and our folder of that name must not hide it from code that runs in this repository."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'the other'")
    code = f"import sys; sys.path.insert(1, {str(tmp_path)!r}); import kernels; print(kernels.name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "the other\n"
