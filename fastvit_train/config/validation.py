"""How settings are checked: types with their bounds (pydantic), marks, and errors in one line."""

import functools
import re
import unicodedata
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictStr, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from fastvit_train.utils.errors import UserError, did_you_mean

MAX_TEXT_BYTES = 1000
MAX_NAME_BYTES = 250
MAX_FOLDER_NAME_BYTES = 200
DATASETS = ("digits", "cifar10", "cifar100", "fashion-mnist", "folder", "shards", "synthetic")
FROM_DATA_DIR = ("folder", "shards")
"""data sets that are what lies in the folder --data-dir, and are named after it"""
HUGGING_FACE = "hf:"
"""begins the names of data sets in the format of the Hugging Face Hub"""
MAX_SIDE = 2**12
IMAGE_SIZES = f"a side in pixels, or HEIGHTxWIDTH such as 32x48, each from 1 to {MAX_SIDE:,}"
COLORS = ("white", "black", "gray")
FLAGS = "the flags"
"""the source of a value that was given on the command line"""
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


class Mark(Enum):
    """What is true of a setting, in addition to its type."""

    MAY_CHANGE = "a resumed run may have another value"
    PATH = "a path on this machine; a pushed run keeps only its last component"
    RUN_NAME = "names the run and does not influence its training; reports leave it out"
    NOT_A_DEPARTURE = (
        "differs from run to run in any case; a model card does not list it as a departure from the recipe"
    )


def _number(value: Any) -> Any:
    """Accept numbers written as strings, since YAML 1.1 reads 1e-3 as a string, and refuse booleans."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value) if isinstance(value, str) else value
    except ValueError:
        raise PydanticCustomError("not_a_number", "not a number") from None


def _plain_text(text: str) -> str:
    """Refuse text that does not fit in a path or on a terminal: control characters, undecodable bytes, long names."""
    printable = all(unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp") for letter in text)
    if (
        printable
        and len(text.encode()) <= MAX_TEXT_BYTES
        and all(len(part.encode()) <= MAX_NAME_BYTES for part in text.split("/"))
    ):
        return text
    raise PydanticCustomError(
        "text",
        f"text on one line, up to {MAX_TEXT_BYTES:,} bytes, and up to {MAX_NAME_BYTES} bytes between two slashes",
    )


def _folder_name(name: str) -> str:
    if Path(name).name != name or name in (".", "..", "") or len(name.encode()) > MAX_FOLDER_NAME_BYTES:
        raise PydanticCustomError(
            "text", f"a plain folder name of up to {MAX_FOLDER_NAME_BYTES} bytes; --runs-dir takes paths"
        )
    return name


def _dataset(name: str) -> str:
    if name in DATASETS or (name.startswith(HUGGING_FACE) and len(name) > len(HUGGING_FACE)):
        return name
    hint = did_you_mean(name, DATASETS)
    raise PydanticCustomError("name", f"{hint}; allowed: {', '.join(DATASETS)}, or {HUGGING_FACE}USER/NAME")


def _color(name: str) -> str:
    if name in COLORS or re.fullmatch("#[0-9a-fA-F]{6}", name):
        return name
    raise PydanticCustomError("text", f"{', '.join(COLORS)}, or a color such as #ffcc00")


def _image_size(value: Any) -> Any:
    """Accept a side in pixels, or HEIGHTxWIDTH, also as two numbers; equal sides become one number."""
    if value is None:
        return None
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    words = "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    match = re.fullmatch("([0-9]{1,4})(?:x([0-9]{1,4}))?", words)
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise PydanticCustomError("text", IMAGE_SIZES)
    return height if height == width else f"{height}x{width}"


Number = BeforeValidator(_number)
Text = Annotated[StrictStr, AfterValidator(_plain_text)]
DatasetName = Annotated[Text, AfterValidator(_dataset)]
Color = Annotated[Text, AfterValidator(_color)]
FolderName = Annotated[Text, AfterValidator(_folder_name)]
Count = Annotated[int, Number, Field(ge=1, le=10**6)]
ImageSide = Annotated[int, Number, Field(ge=1, le=MAX_SIDE)]
ImageSize = Annotated[str | int | None, BeforeValidator(_image_size)]  # tyro can't read a union in a union
Channels = Annotated[Literal[1, 3], BeforeValidator(lambda value: {"1": 1, "3": 3}.get(str(value), str(value)))]
Width = Annotated[int, Number, Field(ge=1, le=10**5)]
LayerCount = Annotated[int, Number, Field(ge=1, le=10**3)]
NonNegativeInt = Annotated[int, Number, Field(ge=0, le=10**9)]
Seed = Annotated[int, Number, Field(ge=0, le=2**31 - 1)]
NonNegative = Annotated[float, Number, Field(ge=0, le=1e9, allow_inf_nan=False)]
Fraction = Annotated[float, Number, Field(ge=0, lt=1, allow_inf_nan=False)]
UnitFraction = Annotated[float, Number, Field(ge=0, le=1, allow_inf_nan=False)]
OperationCount = Annotated[int, Number, Field(ge=1, le=14)]
Magnitude = Annotated[int, Number, Field(ge=0, le=30)]
Positive = Annotated[float, Number, Field(gt=0, le=1e9, allow_inf_nan=False)]
PositiveFraction = Annotated[float, Number, Field(gt=0, le=1, allow_inf_nan=False, description="0.75 means 75%")]
Means = tuple[UnitFraction, ...]
Deviations = tuple[Positive, ...]
Precision = Annotated[
    Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)  # `no` in YAML 1.1
]
MlpRatio = Annotated[float, Number, Field(gt=0, lt=1000, allow_inf_nan=False)]


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(StrictBool if hint is bool else hint)


def checked(key: str, value: Any, hint: Any, source: str) -> Any:
    """Return `value` converted to the annotated type `hint`: a number may be a string, a tuple may be a list.

    Args:
        key: name of the setting.
        value: from a file, a flag or a keyword argument.
        hint: type with its bounds, as annotated in `config.schema`.
        source: where the value comes from, for the error.

    Raises:
        UserError: if the type is wrong or the value is out of range.
    """
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        raise UserError(_message(key, error.errors()[0], hint, source)) from None


def _message(key: str, error: ErrorDetails, hint: Any, source: str) -> str:
    value = error["input"]
    inner = _without_none(hint)
    if error["type"] == "literal_error":
        literal = get_args(inner)[0] if get_origin(inner) in (tuple, Annotated) else inner
        options = list(map(str, get_args(literal)))
        hint_text = did_you_mean(str(value), options)
        return f"{key}: {value!r} in {source} is not allowed{hint_text}; allowed: {', '.join(options)}"
    flag = f"--{key.replace('_', '-')}"
    if error["type"] == "name":
        subject = f"{flag} {value!r}" if source == FLAGS else f"{key}: {value!r} in {source}"
        return f"{subject} is not allowed{error['msg']}"
    if error["type"] == "text":
        return f"{flag} {value!r} is not allowed; allowed: {error['msg']}"
    if error["type"] in OUT_OF_RANGE:
        one = get_args(inner)[0] if get_origin(inner) is tuple else inner
        return f"{flag} {value} is out of range; allowed: {_allowed(one)}"
    kind = get_args(inner)[0] if get_origin(inner) is Annotated else get_origin(inner) or inner
    return f"{key}: {value!r} in {source} is not of type {'list' if kind is tuple else getattr(kind, '__name__', kind)}"


def _allowed(hint: Any) -> str:
    """The bounds of an annotated number in words."""
    fields = [item for item in get_args(hint)[1:] if isinstance(item, FieldInfo)]
    bounds = [bound for info in fields for bound in info.metadata]
    words = []
    for bound in bounds:
        match bound:
            case Ge(low):
                words.append(f"at least {low:,}")
            case Gt(low):
                words.append(f"above {low:,}")
            case Le(high):
                words.append(f"at most {high:,.0f}")
            case Lt(high):
                words.append(f"below {high:,}")
    return ", ".join(words) + "".join(f" ({info.description})" for info in fields if info.description)


def _without_none(hint: Any) -> Any:
    """`hint` without marks, and without None if it is optional."""
    while True:
        arguments = get_args(hint)
        if get_origin(hint) is Annotated and all(isinstance(item, Mark) for item in arguments[1:]):
            hint = arguments[0]
        elif type(None) in arguments:
            hint = next(option for option in arguments if option is not type(None))
        else:
            return hint
