"""Downloads through torchvision, with a progress bar, a timeout and an MD5 check."""

import contextlib
import http.client
import io
import shutil
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from torchvision.datasets.utils import calculate_md5, download_url

from fastvit_train.utils.atomic_io import staged
from fastvit_train.utils.errors import UserError

TIMEOUT_SECONDS = 30


def check_md5(path: Path, expected: str, remedy: str) -> None:
    """Raise UserError, which ends with `remedy`, unless `path` is a file with the MD5 `expected`."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    try:
        actual = calculate_md5(path)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); {remedy}") from None
    if actual != expected:
        raise UserError(f"{path} is damaged or is a different file: MD5 {actual}, expected {expected}; {remedy}")


def download(url: str, target: Path, md5: str, wanted: str) -> None:
    """Fetch `url` to `target`, which appears only once it is complete and has the right MD5.

    Raises:
        UserError: if the file is not available there; the message says to put `wanted` into the target's folder.
    """
    try:
        with staged(target) as partial:
            _fetch(url, partial)
            if (actual := calculate_md5(partial)) != md5:
                raise ValueError(f"the file there has MD5 {actual}, expected {md5}")
    except (OSError, ValueError, RuntimeError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"can't download {url} ({reason}); put {wanted} into {target.parent}, name a mirror with --data-url, "
            "or train on the digits (--dataset digits), which need no network"
        ) from None


def _fetch(url: str, target: Path) -> None:
    """Write the content of `url` to `target`."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":  # torchvision's progress bar can't be used with these
        source = Path(urllib.request.url2pathname(parts.path))
        if not source.is_file():
            raise FileNotFoundError(f"{source} is not a file")
        shutil.copyfile(source, target)
        return
    if parts.scheme not in ("http", "https"):
        raise ValueError("not a URL; allowed are http://, https:// and file://")
    with _timeout(), contextlib.redirect_stderr(_ProgressBar(url, sys.stderr)):
        download_url(url, target.parent, target.name)


@contextlib.contextmanager
def _timeout() -> Iterator[None]:
    """Let a connection fail after TIMEOUT_SECONDS without data; torchvision sets no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


class _ProgressBar(io.TextIOBase):
    """Receives torchvision's progress bar; prints the URL once data arrives, and the bar only on a terminal."""

    def __init__(self, url: str, stderr: TextIO) -> None:
        self._headline = f"downloading {url}\n"
        self._stderr = stderr

    def write(self, text: str) -> int:
        self._stderr.write(self._headline)
        self._headline = ""
        if self._stderr.isatty():
            self._stderr.write(text)
        return len(text)

    def flush(self) -> None:
        self._stderr.flush()
