"""Imports run one way, and kernels/ stays a plain folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def top_levels(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_know_torch_alone(path: Path) -> None:
    assert top_levels(path) <= {"torch", "triton", "fastvit_kernels", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", sorted((ROOT / "fastvit_train").rglob("*.py")), ids=lambda p: p.name)
def test_only_models_import_the_kernels_and_nothing_imports_bench_or_tests(path: Path) -> None:
    assert not top_levels(path) & {"bench", "tests"}
    if path.parent.name != "models":
        assert "fastvit_kernels" not in top_levels(path)


def test_only_the_command_line_knows_the_parser() -> None:
    users = [p.name for p in (ROOT / "fastvit_train").rglob("*.py") if top_levels(p) & {"tyro", "argparse"}]
    assert users == ["main.py"]


def test_kernels_is_a_folder_not_a_package() -> None:
    assert not list((ROOT / "kernels").glob("*.py"))


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
    """The one on PyPI is, and our folder of that name must not hide it from who works in this repository."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'the other'")
    code = f"import sys; sys.path.insert(1, {str(tmp_path)!r}); import kernels; print(kernels.name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "the other\n"
