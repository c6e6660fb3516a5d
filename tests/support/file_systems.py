"""Disks that lack abilities, as exFAT, SMB and Drive in Colab do: links, locks, permissions, the sync of folders."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ERRORS = (errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
"""what such file systems raise"""
ABILITIES = ((os, "symlink"), (os, "link"), (os, "fsync"), (os, "chmod"), (fcntl, "flock"), (fcntl, "lockf"))

on_every_disk = pytest.mark.parametrize(
    "number",
    [ERRORS[0], *(pytest.param(number, marks=pytest.mark.slow) for number in ERRORS[1:])],
    ids=lambda number: errno.errorcode[number],
)


def take_abilities_away(disk: Path, number: int, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Make what such a file system refuses raise `OSError(number)` in the folder `disk`, which stands for one.

    `patch` may be the `setattr` of monkeypatch.
    """

    def without(name: str, ability: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if _path(args[1] if name in ("symlink", "link") else args[0]).is_relative_to(disk):
                raise OSError(number, os.strerror(number))
            return ability(*args, **kwargs)

        return call

    for module, name in ABILITIES:
        patch(module, name, without(name, getattr(module, name)))


def _path(file: Any) -> Path:
    """Return the path of a file, given as a path, an open file or a descriptor."""
    if isinstance(file, str | os.PathLike):
        return Path(file)
    descriptor = file if isinstance(file, int) else file.fileno()
    return Path(f"/proc/self/fd/{descriptor}").resolve()
