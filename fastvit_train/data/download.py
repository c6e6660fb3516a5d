"""Downloads with progress and checksum."""

import hashlib
import os
import sys
import urllib.parse
import urllib.request
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from fastvit_train.errors import UserError

TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 18


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
    if urllib.parse.urlsplit(url).scheme not in ("http", "https", "file"):
        raise UserError(f"--data-url {url} is no URL; allowed: http://, https:// or file://")
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, partial)
        check_md5(partial, md5)
        partial.replace(target)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"can't download {url} ({reason}); put {put} into {target.parent}, name a mirror with --data-url, "
            "or train on the digits (--dataset digits), which need no network"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _fetch(url: str, target: Path) -> None:
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with (
        urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response,
        target.open("wb") as file,
        Progress(*columns, disable=not sys.stderr.isatty()) as progress,
    ):
        print(f"downloading {url}", file=sys.stderr)
        length = response.headers.get("Content-Length")
        task = progress.add_task(target.name.partition(".")[0], total=int(length) if length else None)
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            progress.update(task, advance=len(chunk))
