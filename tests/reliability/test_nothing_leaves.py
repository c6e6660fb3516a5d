"""In a separate process: only the connections that were asked for, and hostile inputs end as in a user's shell."""

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability.malformed import MALFORMED, TINY, Evil
from tests.reliability.test_malformed import IMAGES, LAUGHS
from tests.support import ROOT, one_line_error, run, write_folder

# Python imports a module of this name when it starts.
WATCH = """
import os, socket

def watched(name):
    real = getattr(socket.socket, name)
    def call(self, *args):
        address = args[-1] if name == "sendto" else args[0]
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(("127.", "::1")):
            with open(os.environ["WATCHED"], "a") as file:
                file.write(f"{address[0]}\\n")
            raise OSError("watched")
        return real(self, *args)
    setattr(socket.socket, name, call)

for name in ("connect", "connect_ex", "sendto"):
    watched(name)
real_lookup = socket.getaddrinfo

def lookup(host, *args, **options):
    if host not in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname()):
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{host}\\n")
        raise OSError("watched")
    return real_lookup(host, *args, **options)

socket.getaddrinfo = lookup
"""

SESSION = """
from fastvit_train.cli.main import main
tiny = {tiny!r}
main(["--exp-name", "a", *tiny])
main(["--exp-name", "a", *tiny, "--resume", "must"])
main(["eval", "runs/a"])
main(["compare", "runs/a"])
main(["export", "runs/a", "--to", "safetensors"])
main(["push", "runs/a", "me/a", "--dry-run"])
print(open({seen!r}).read() == "", "before a download is asked for")
main(["--dataset", "cifar10", "--data-url", "http://mirror.invalid/", *tiny])
"""


@pytest.mark.slow
def test_nothing_is_sent_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(WATCH)
    seen = tmp_path / "seen"
    seen.touch()
    path = os.pathsep.join([str(tmp_path / "hook"), os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels")])
    code = SESSION.format(tiny=list(TINY), seen=str(seen))
    result = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=path, WATCHED=str(seen))
    assert "True before a download is asked for" in result.stdout, result.stdout + result.stderr + seen.read_text()
    assert "can't download http://mirror.invalid/" in one_line_error(result.stderr)
    assert set(seen.read_text().split()) == {"mirror.invalid"}, "the watch sees what is asked for, and nothing else"


def _laughs(root: Path) -> list[object]:
    (root / "it.yaml").write_text(LAUGHS)
    return ["--config", root / "it.yaml"]


def _weights(root: Path) -> list[object]:
    (root / "it.pth").write_bytes(pickle.dumps(Evil(root / "ran"), protocol=4))  # torch warns about it too
    return ["--weights", root / "it.pth"]


def _batch(root: Path) -> list[object]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps({"data": Evil(root / "ran")}))
    return ["--dataset", "cifar10", "--data-dir", root]


def _image(root: Path) -> list[object]:
    write_folder(root / "photos", per_class=2)
    (root / "photos" / "train" / "circle" / "1.png").write_bytes(IMAGES["100000 x 100000.png"])
    return ["--dataset", "folder", "--data-dir", root / "photos"]


def _streamed(root: Path) -> list[object]:
    return [*_image(root), "--stream", "always"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(_laughs, "aliases", marks=pytest.mark.slow),
        (_weights, "cannot be read as weights"),
        (_streamed, "1.png can't be decoded"),
        pytest.param(_batch, "data_batch_1 is damaged or is a different file: MD5", marks=pytest.mark.slow),
        pytest.param(_image, "1.png can't be decoded", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_in_a_process(
    tmp_path: Path, count: Callable[..., None], make: Callable[[Path], list[object]], said: str
) -> None:
    args = [*make(tmp_path), "--runs-dir", tmp_path / "runs", *TINY]
    result = run(
        [sys.executable, "-m", "fastvit_train", *map(str, args)], tmp_path, PYTHONPATH=f"{ROOT}:{ROOT}/kernels"
    )
    assert result.returncode == 2 and said in one_line_error(result.stderr)
    assert result.stderr.count("\n") == 1, result.stderr
    assert not list(tmp_path.glob("runs/*")) and not (tmp_path / "ran").exists()
    count(MALFORMED)
