"""Files of settings: the config.yaml of a run, and what --config reads."""

import re
from pathlib import Path
from typing import Any

import yaml

from fastvit_train import __version__
from fastvit_train.config.overrides import override, to_plain
from fastvit_train.config.schema import TrainConfig
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.safe_load import read_settings

VERSION_KEY = "fastvit_train"
"""the entry of config.yaml with the version that wrote it"""


def to_yaml(config: TrainConfig) -> str:
    """Return the settings as YAML, as --config reads them."""
    return str(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))


def to_file(config: TrainConfig) -> str:
    """Return the content of config.yaml: the version that writes it, and the settings."""
    return f"{VERSION_KEY}: {__version__}\n{to_yaml(config)}"


def read(path: Path) -> dict[str, Any]:
    """Read the settings in a file, by name, without the version that wrote it.

    Raises:
        OSError, ValueError: if the file cannot be read, or holds something else.
        UserError: if a newer version wrote it and this one does not know one of its settings or values.
    """
    settings = read_settings(path)
    hint = upgrade_hint(settings.pop(VERSION_KEY, None))
    if hint:
        try:
            override(TrainConfig(), settings, str(path))
        except UserError as error:
            raise UserError(f"{error}; {hint}") from None
    return settings


def upgrade_hint(version: object) -> str:
    """Return what to do about a file if `version`, which wrote it, is newer than this one; empty if it is not."""
    if _numbers(str(version)) <= _numbers(__version__):
        return ""
    return f"fastvit-train {version} wrote it, and this is {__version__}: pip install --upgrade fastvit-train"


def _numbers(version: str) -> list[int]:
    """Return the release numbers of a version: [0, 2, 0] for 0.2.0.dev1; empty for something else."""
    release = re.match(r"\d{1,9}(\.\d{1,9})*", version)
    return [int(number) for number in release[0].split(".")] if release else []
