"""Any data set, checkpoint, configuration or flag is either well-formed, or ends in one line and exit status 2."""

import io
import math
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest

pytest.importorskip("hypothesis")
import yaml
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

import fastvit_train.models  # noqa: F401 before a test's clock starts
from fastvit_train.config.overrides import flatten
from fastvit_train.config.recipes import recipe
from fastvit_train.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from tests.reliability.malformed import (
    MALFORMED,
    NOT_WRITABLE,
    TINY,
    check_examples,
    error_line,
    is_refused,
    mutated,
    some_or_many,
)
from tests.support import write_folder, write_program

Count = Callable[..., None]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run commands in an empty folder, which must stay empty."""
    folder = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(folder)
    yield
    assert not list(folder.iterdir())


# Settings

LAUGHS = "a: &a [x, x]\n" + "\n".join(f"{b}: &{b} [*{a}, *{a}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
CONFIGS = [
    "epochs: 1e30", "epochs: 10**30", "epochs: .nan", "epochs: .inf", "epochs: -1", f"epochs: {10**400}", "epochs: 1.5",
    f"epochs: 0x{'f' * 60000}", f"epochs: {':'.join(['1'] * 9000)}", f"lr: {':'.join(['1'] * 900)}.5", "epochs: yes",
    "epochs:", "epochs: 2020-99-99", "epochs: [1]", "epochs: {a: 1}", "epochs: 0x_", f"batch_size: {10**30}",
    "seed: -1",
    f"seed: {2**63}", "lr: .nan", "lr: -.inf", "lr: 1e400", "lr: one", "lr: 1e300", "weight_decay: 1e38",
    "momentum: 1", "track: wandb", "track: [1]", "track: [[tensorboard]]", "flip: [none]", "flip: 0", "decay_all: 1",
    "dataset: ~", "dataset: mnist", "exp_name: a/b", "exp_name: ..", 'exp_name: ""', 'exp_name: "a\\0b"',
    'exp_name: "a\\nb"', 'exp_name: "\\e[31mred"', 'exp_name: "\\u2028"', f"exp_name: {'ä' * 199}", "exp_name: [a]",
    'data_dir: "a\\0b"', f"data_dir: {'x' * 300}", 'weights: "a\\0b"', f"weights: {'y/' * 3000}", "weights: /dev/zero",
    "weights: /", "recipe: [quickstart]", "recipe: {}", "recipe: nope", "recipe: 3", "model: hf-hub:timm/resnet18",
    "model: local-dir:/tmp", "model: ../resnet18", "model: resnet18.nonsense", 'model: ""', "optimizer: os.system",
    "optimizer: ~", "embed_dim: 99999\nnum_heads: 1\ndepth: 900", "embed_dim: 1000000", "image_size: 5000",
    "num_classes: 10000000", "crop_scale: 2", "holdout: 0.9999999", "grad_accum: 7",
    "batch_size: 999983\ngrad_accum: 2",
    LAUGHS, "[" * 20000, "{" * 20000, "a: " + "[" * 5000, "- " * 9000, "? " * 9000, "lr: 1\nlr: 1",
    "batch_size: 64\nbatch-size: 64", "epochs: 1\n---\nepochs: 2", "!!python/object/apply:os.system ['touch ran']",
    "epochs: !!python/name:os.system", "epochs: !!timestamp x", "epochs: !!int ''", "epochs: !!bool x",
    "epochs: &a 1", "<<: {epochs: 1}", "<<: 3", "1: 2", "? [a]\n: b", "~: 1", "- epochs", "epochs", "3", "a: b: c",
    "\tepochs: 1", "a: [", "%YAML 9.9\n---\na: 1", "epochz: 3", "#" * 70000, "a: =", "\x00", "a: \x1b[31m",
    b"\xff\xfee\0p\0", b"epochs: 1\xe9", b"\x80\x04N.", "a: '", '"\\x"', "a: *b", "epochs: @1", "epochs: `id`",
    "a:\n\n- b: 1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(0, len(CONFIGS), 30))
def test_configurations(tmp_path: Path, count: Count, chunk: int) -> None:
    file = tmp_path / "it.yaml"
    for text in CONFIGS[chunk : chunk + 30]:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert is_refused(count, "--config", file, "--runs-dir", NOT_WRITABLE, "--attention", "fused"), text[:100]


NUMBERS = st.integers(-3, 3) | st.sampled_from([2**31, 2**63, -(2**64), 10**30, 1e30, -1e-30, 1e308, float("nan")])
VALUES = st.none() | st.booleans() | NUMBERS | st.text(max_size=20) | st.floats()
KEYS = st.sampled_from([key for key in flatten(TrainConfig()) if key not in ("compile", "attention", "runs_dir")])


@some_or_many("examples", 30, 300)
def test_generated_configurations(tmp_path: Path, count: Count, seed: int, examples: int) -> None:
    file = tmp_path / "it.yaml"
    whole = yaml.safe_dump(flatten(recipe("quickstart")) | {"track": []}).encode()
    made_up = st.dictionaries(KEYS, VALUES | st.lists(VALUES, max_size=3), min_size=1, max_size=4)
    texts = made_up.map(lambda settings: yaml.safe_dump(settings).encode()) | mutated(whole) | st.binary(max_size=40)

    def check(text: bytes) -> None:
        file.write_bytes(text)
        is_refused(count, "--config", file, "--runs-dir", NOT_WRITABLE, "--attention", "fused", "--no-compile")

    check_examples(texts, examples, seed, check)


FLAGS = [
    ["\0"], ["--\0"], ["--epochs", "\0"], ["--exp-name", "a\0b"], ["--exp-name", "a\nb"], ["--exp-name", "\x1b[2J"],
    ["--exp-name", "\udce9"], ["--exp-name="], ["--exp-name", "ä" * 150], ["--epochs=1=2"], ["-"],
    ["--data-dir", "\0", "--dataset", "folder"], ["--data-dir", "x" * 5000, "--dataset", "folder"],
    ["--runs-dir", "\0"], ["--runs-dir", "x" * 5000], ["--runs-dir", "\x1b[2J"], ["--weights", "\0"],
    ["--weights", "."],
    ["--weights", "x" * 5000], ["--config", "\0"], ["--config", "."], ["--config", "x" * 5000],
    ["--config", "/dev/zero"],
    ["--config", "/dev/null/x"], ["--config", "a", "--config"], ["--model", "\x1b[31m"],
    ["--model", "hf-hub:a/resnet18"],
    ["--model", "local-dir:."], ["--epochs", "9" * 5000], ["--epochs", "1e999"], ["--lr", "9" * 500], ["--repeat", "0"],
    ["--lr", "1e300"], ["--track", "x"], ["--compile=3"], ["---epochs", "3"], ["--epochs", "3", "4"], ["--e", "3"],
    ["--data-url", "http://\0", "--dataset", "cifar10"], ["--data-url", "file:///", "--dataset", "cifar10"],
    ["--data-url", "http://[", "--dataset", "cifar10"],
    ["--data-url", "file:///dev/null/x", "--dataset", "fashion-mnist"],
    ["profile", "--output", "\0"], ["profile", "--steps", "-1"], ["eval"], ["eval", "\0"], ["eval", "x" * 5000],
    ["eval", "/"],
    ["eval", "a", "b"], ["compare", "\0"], ["compare", "x" * 5000], ["compare", "."], ["compare", "--markdown"],
    ["\x1b[2J"],
    ["TRAIN"], ["train", "train"], ["--recipe", "__class__"], ["--recipe", ""], ["--optimizer", "$(touch ran)"],
    ["--attention", "`touch ran`"], ["--attention", ""], ["--overwrite", "--resume", "must"],
]  # fmt: skip


@pytest.mark.slow
def test_flags(tmp_path: Path, count: Count) -> None:
    for flags in FLAGS:
        before = ("--runs-dir", NOT_WRITABLE, *TINY) if flags[0].startswith("-") else ()
        assert is_refused(count, *before, *flags), flags


def _wrong_values(hint: Any) -> list[str]:
    kinds = {option for option in (get_args(hint) or (hint,)) if option is not type(None)}
    if kinds & {int, float}:
        return ["x", "", "nan", "-9999999999", "9" * 400, "0x1", "1,5", "٣x", "1e999", "--", "[1]", "\0"]
    return ["\0", "\x1b[31mx", "a\nb", "x" * 3000]


@some_or_many("some", 10, 100)
def test_every_flag_with_wrong_values(count: Count, seed: int, some: int) -> None:
    draw = random.Random(seed)
    for section in (RunConfig, ModelConfig, DataConfig, OptimConfig):
        for key, hint in get_type_hints(section).items():
            if hint is bool or get_origin(hint) is tuple:
                continue
            values = _wrong_values(hint)
            for value in draw.sample(values, min(some, len(values))):
                flags = [f"--{key.replace('_', '-')}", value]
                assert is_refused(count, "--runs-dir", NOT_WRITABLE, *TINY, *flags), flags


# Images


def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _encoded(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def _tiff(dtype: type, low: float | None = None, high: float | None = None) -> bytes:
    """A TIFF file whose pixels have more than 16 bits, and the range that it states."""
    file = io.BytesIO()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if low is not None:
        for tag, value in ((340, low), (341, high)):
            tags.tagtype[tag] = 12
            tags[tag] = value
    Image.fromarray(np.ones((9, 12), dtype)).save(file, "TIFF", tiffinfo=tags)
    return file.getvalue()


BOMB = zlib.compress(bytes(1 << 27), 1)
POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(ran) (w) file closefile\nshowpage\n%%EOF\n"
)
IMAGES = {
    "100000 x 100000.png": _png(100_000, 100_000),
    "as many pixels as Pillow only warns about.png": _png(12_000, 10_000),
    "2147483647 x 1.png": _png(2**31 - 1, 1),
    "0 x 0.png": _png(0, 0),
    "ztxt bomb.png": _png(5, 5, (b"zTXt", b"k\0\0" + BOMB)),
    "itxt bomb.png": _png(5, 5, (b"iTXt", b"k\0\1\0\0\0" + BOMB)),
    "iccp bomb.png": _png(50_000, 50_000, (b"iCCP", b"k\0\0" + BOMB)),
    "postscript.png": POSTSCRIPT,
    "empty.png": b"",
    "one byte.jpg": b"\xff",
    "text.gif": b"hello",
    "html.jpeg": b"<html>404</html>",
    "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "pickle.png": b"\x80\x04\x95",
    "only a header.png": _encoded("PNG")[:33],
    "half.jpg": _encoded("JPEG")[: len(_encoded("JPEG")) // 2],
    "half.webp": _encoded("WEBP")[: len(_encoded("WEBP")) // 2],
    "half.bmp": _encoded("BMP")[:100],
    "half.tiff": _encoded("TIFF")[:100],
    "half.gif": _encoded("GIF")[:30],
    "half.ppm": _encoded("PPM")[:30],
    "99999 x 99999.ppm": b"P6 99999 99999 255\n",
    "no size.ppm": b"P6 x y z\n",
    "65535 x 65535.gif": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
    "lying.bmp": _encoded("BMP")[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + _encoded("BMP")[26:],
    "floats without a range.tiff": _tiff(np.float32),
    "32 bits without a range.tiff": _tiff(np.int32),
    "an empty range.tiff": _tiff(np.float32, 1, 1),
    "a range that is NaN.tiff": _tiff(np.float32, math.nan, 1),
    "an infinite range.tiff": _tiff(np.int32, -math.inf, math.inf),
    "lying.tiff": _encoded("TIFF").replace(struct.pack("<HHII", 256, 4, 1, 12)[:8], struct.pack("<HHI", 256, 4, 1)[:8]),
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of images that are well-formed."""
    return write_folder(tmp_path / "photos", per_class=1)


def ask_folder(count: Count, photos: Path, *flags: str) -> bool:
    return is_refused(count, "--dataset", "folder", "--data-dir", photos, "--runs-dir", NOT_WRITABLE, *TINY, *flags)


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program with the name that Pillow calls for PostScript; it must not be started."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    write_program(program, f"touch {tmp_path / 'started'}")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    yield
    assert not (tmp_path / "started").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ghostscript")
def test_images(photos: Path, count: Count) -> None:
    for name, content in IMAGES.items():
        file = photos / "train" / "circle" / name
        file.write_bytes(content)
        line = error_line("--dataset", "folder", "--data-dir", photos, "--runs-dir", NOT_WRITABLE, *TINY)
        if name != "lying.tiff" or line:
            assert line and f"circle/{name} can't be decoded" in line, (name, line)
            count(MALFORMED)
        file.unlink()


def test_paths_that_are_not_regular_files(photos: Path, count: Count) -> None:
    folder = photos / "train" / "circle"
    special: dict[str, Callable[[Path], object]] = {
        "fifo": os.mkfifo,
        "zeros": lambda path: path.symlink_to("/dev/zero"),
        "loop": lambda path: path.symlink_to(path.name),
        "nowhere": lambda path: path.symlink_to("/nowhere/at/all"),
        "sparse": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    }
    for name, make in special.items():
        path = folder / f"{name}.png"
        make(path)
        assert ask_folder(count, photos), name
        path.unlink()


@pytest.mark.parametrize("examples", [4, pytest.param(150, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_images_mutated(photos: Path, count: Count, seed: int, kind: str, examples: int) -> None:
    file = photos / "train" / "circle" / f"0.{kind.lower()}"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        ask_folder(count, photos)

    check_examples(mutated(_encoded(kind)), examples, seed, check)
