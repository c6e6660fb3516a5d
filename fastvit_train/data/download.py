"""Downloads with progress and checksum."""

import contextlib
import hashlib
import http.client
import os
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from fastvit_train.utils.errors import UserError

TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 18
MAX_BYTES = 1 << 29


def md5_of(path: Path) -> str:
    """The file's MD5 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def check_md5(path: Path, expected: str) -> None:
    """Raise UserError unless the file has that MD5."""
    if (found := md5_of(path)) != expected:
        raise UserError(f"{path} is damaged or another file: MD5 {found}, expected {expected}; delete it and try again")


def download(url: str, target: Path, md5: str, put: str) -> None:
    """Fetch `url` to `target`, with a progress bar; `target` appears only when it is whole.

    Raises:
        UserError: where there is no network or the file is not the expected one; says to place `put` by hand.
    """
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https", "file"):
            raise ValueError("no URL; allowed are http://, https:// and file://")
        _fetch(url, partial)
        if (found := md5_of(partial)) != md5:
            raise ValueError(f"it has MD5 {found}, expected {md5}")
        partial.replace(target)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"can't download {url} ({reason}); put {put} into {target.parent}, name a mirror with --data-url, "
            "or train on the digits (--dataset digits), which need no network"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _fetch(url: str, target: Path) -> None:
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url}", file=sys.stderr)
        length = response.headers.get("Content-Length")
        with target.open("wb") as file, Progress(*columns, disable=not sys.stderr.isatty()) as progress:
            _copy(response, file, progress, target.name.partition(".")[0], int(length) if length else None)


def _copy(source: IO[bytes], target: IO[bytes], progress: Progress, title: str, total: int | None) -> None:
    task = progress.add_task(title, total=total)
    while chunk := source.read(CHUNK_BYTES):
        if target.tell() + len(chunk) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
        target.write(chunk)
        progress.update(task, advance=len(chunk))
