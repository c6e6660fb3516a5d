"""What the check needs before its first part: packages, images, and the facts of the machine.

Only the standard library is imported here, since other packages may be missing until the wheels are unpacked.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOR_TESTS = ("pytest", "pytest-benchmark", "pytest-xdist")


IMPORT_ALL = """
import json
import bench.__main__, fastvit_train.cli.main, fastvit_train.training.loop
from bench.environment import environment
from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import recipe
override(recipe("quickstart"), {"lr": 1e-3}, "the check")  # pydantic imports its parts when they are needed
print(json.dumps(environment()))
"""


class NotReady(Exception):
    """The check cannot start; the message is one line that says why, and what to do."""


def add_wheels(folder: Path, site: Path) -> list[str]:
    """Unpack the wheels of packages that are not installed, and have this process and its children import them.

    A wheel is unpacked as an archive: pip may be missing too.

    Returns:
        Name and version of each package that was unpacked.
    """
    wheels = [path for path in sorted(folder.glob("*.whl")) if not is_installed(path.name.partition("-")[0])]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join((str(site), os.environ["PYTHONPATH"]))
    return [" ".join(wheel.name.split("-")[:2]) for wheel in wheels]


def require_packages() -> None:
    """Raise NotReady if a package that the project or its tests need is not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[^\w.-]", requirement)[0] for requirement in project["dependencies"]]
    if missing := " ".join(name for name in (*names, *FOR_TESTS) if not is_installed(name)):
        command = f"pip download -d DIR {missing}"
        raise NotReady(f"not installed: {missing}; run `{command}` where there is a network, and give --wheels DIR")


def is_installed(package: str) -> bool:
    """Return whether the metadata of a package is found."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def find_images(source: Path, folder: Path) -> Path:
    """Return the folder that holds train/CLASS/ and test/CLASS/, in `source` or, if that is an archive, in `folder`.

    Raises:
        NotReady: if `source` cannot be unpacked or has no such folders.
    """
    if not source.is_dir():
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            try:
                shutil.unpack_archive(source, partial, filter=None if source.suffix == ".zip" else "data")
            except (OSError, ValueError, EOFError) as error:
                raise NotReady(f"--images {source}: {error}; allowed: .tar.xz, .tar.gz, .tar, .zip, a folder") from None
            partial.rename(folder)
        source = folder
    for root in (source, *sorted(source.iterdir())):
        if (root / "train").is_dir() and (root / "test").is_dir():
            return root
    raise NotReady(f"--images {source} has no folders train/CLASS/ and test/CLASS/")


def find_environment() -> dict[str, Any]:
    """Import what the parts will need and return `bench.environment.environment()`.

    Another process does it, which keeps this one off the GPU.

    Raises:
        NotReady: if the project cannot be imported.
    """
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise NotReady(f"the project cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
