"""Pickles of plain values and arrays of whole numbers, read without running anything that they ask for.

What such a pickle names is answered by the stand-ins here, which make an array from its bytes; numpy's own functions
would take the inner layout of a type, pointers included, from the pickle.
"""

import io
import pickle
import re
from typing import IO, Any, ClassVar

import numpy as np


class _Type:
    """For numpy.dtype: whole numbers of 1 to 8 bytes."""

    def __init__(self, code: Any, *_: Any) -> None:
        code = code.decode() if isinstance(code, bytes) else code
        if not re.fullmatch("[iu][1248]", code):
            raise ValueError(f"it has an array of type {code}, expected whole numbers")
        self._type = np.dtype(code)

    def set_state(self, state: Any) -> None:
        if state[1] in (b">", ">"):
            self._type = self._type.newbyteorder(">")

    def array(self, data: Any, shape: Any, order: str) -> np.ndarray:
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(data, self._type).reshape(shape, order=order)  # type: ignore[call-overload]


class _Array:
    """For numpy.ndarray and what pickle protocols up to 4 rebuild one with; its content comes after it."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        _, shape, kind, is_fortran, data = state
        self.value = kind.array(data, shape, "F" if is_fortran else "C")


class _FromBuffer:
    """For what protocol 5 rebuilds an array with."""

    def __new__(cls, data: Any, kind: _Type, shape: Any, order: str) -> Any:
        return kind.array(data, shape, order)


class _Scalar:
    """For a single number of numpy's."""

    def __new__(cls, kind: _Type, data: Any) -> Any:
        return int(kind.array(data, (), "C"))


class _Bytes:
    """For what Python 3 writes bytes with in protocols that Python 2 reads."""

    def __new__(cls, text: str, _: Any) -> Any:
        return text.encode("latin1")


STAND_INS: dict[str, type] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Type,
    "_codecs.encode": _Bytes,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": _Scalar,
    "numpy.core.numeric._frombuffer": _FromBuffer,
}


class _Unpickler(pickle._Unpickler):  # in Python: the one in C takes the size of its tables from the pickle
    stack: list[Any]
    pop_mark: Any
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    for _opcode in (pickle.ADDITEMS, pickle.FROZENSET):  # sets hash what may be nested too deeply for it
        del dispatch[_opcode[0]]

    def find_class(self, module: str, name: str) -> type:
        wanted = f"{module}.{name}"
        if (stand_in := STAND_INS.get(wanted.replace("numpy._core.", "numpy.core."))) is None:
            raise pickle.UnpicklingError(f"it asks for {wanted}, which arrays have no use for")
        return stand_in

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, _Type | _Array):
            raise pickle.UnpicklingError(f"it sets attributes of a {type(target).__name__}")
        target.set_state(state)

    def load_setitem(self) -> None:
        value, name = self.stack.pop(), self.stack.pop()
        self._set([name, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(name, str | bytes):
                raise pickle.UnpicklingError(f"it has a {type(name).__name__} for a name")
            self.stack[-1][name.decode() if isinstance(name, bytes) else name] = value

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def load_arrays(file: IO[bytes], max_bytes: int) -> dict[str, Any]:
    """The dict in the pickle `file`: by name texts, bytes, numbers, lists of them, and arrays of whole numbers.

    Raises:
        OSError, EOFError: where it can't be read.
        ValueError: where it is larger than `max_bytes`, damaged, or holds something else.
    """
    content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    try:
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, expected a dict")
    return {name: value.value if isinstance(value, _Array) else value for name, value in loaded.items()}
