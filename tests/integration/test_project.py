"""The project's own files agree with each other: versions of Python, of dependencies and of the package."""

import re
import tomllib
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import fastvit_train
from tests.support import ROOT


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """The table [project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    """The jobs of the hosted workflow."""
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]


def test_the_workflow_tests_the_supported_versions_of_python(project: dict[str, Any], jobs: dict[str, Any]) -> None:
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    supported = SpecifierSet(project["requires-python"])
    assert tested == classified == [f"3.{minor}" for minor in range(30) if f"3.{minor}" in supported]
    assert jobs["oldest-versions"]["steps"][1]["with"]["python-version"] == tested[0]


def test_the_workflow_starts_only_files_that_exist(jobs: dict[str, Any]) -> None:
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    paths = [path for command in commands for path in re.findall(r"(?:bash|--constraint) (\S+)", command)]
    assert len(paths) >= 3 and all((ROOT / path).is_file() for path in paths)


def test_the_workflow_installs_the_extra_docs(project: dict[str, Any], jobs: dict[str, Any]) -> None:
    install = jobs["docs"]["steps"][2]["run"]
    assert re.findall(r'"([^"]+)"', install.partition("#")[0]) == project["optional-dependencies"]["docs"]


def test_the_constraints_are_the_minimums_of_the_dependencies(project: dict[str, Any]) -> None:
    lines = (ROOT / ".github" / "oldest.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert pinned == [str(Requirement(each)).replace(">=", "==") for each in project["dependencies"]]


def test_the_newest_release_in_the_changelog_is_dated_and_of_this_version() -> None:
    entry = re.search(r"^## (?!Unreleased$)(.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entry is not None
    version, _, date = entry[1].partition(" - ")
    assert Version(version) == Version(fastvit_train.__version__)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
