"""What a verb takes on the command line, read from its dataclass: for completion and for error messages."""

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastvit_train.config.names import ATTENTIONS, MODELS
from fastvit_train.config.recipes import RECIPES
from fastvit_train.config.validation import DATASETS
from fastvit_train.distributed.slow_imports import slow_imports

HELP = "--help"
TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", Path: "a path"}


def _optimizers() -> list[str]:
    with slow_imports():
        from timm.optim import list_optimizers

    return list(map(str, list_optimizers()))


NAMES: dict[str, Callable[[], Iterable[str]]] = {
    "recipe": lambda: RECIPES,
    "dataset": lambda: DATASETS,
    "model": lambda: MODELS,
    "models": lambda: MODELS,
    "attention": lambda: ATTENTIONS,
    "optimizer": _optimizers,
}
"""the names to propose for a setting whose type is only `str`"""


@dataclass(frozen=True)
class Flag:
    """A flag or a positional argument of a verb."""

    name: str
    """as the user types it; a positional argument's name has no dashes"""
    type: Any
    """the type of one value"""
    optional: bool = False
    """the value may also be None"""
    several: bool = False
    """the flag takes one or more values"""
    length: int = 0
    """number of values that the flag takes if it takes several; 0: any number"""
    switch: bool = False
    """the flag takes no value"""
    required: bool = False
    """a positional argument that must be given"""

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")

    @property
    def values(self) -> tuple[str, ...]:
        """All values that the type allows; empty if it has too many to list."""
        if self.switch:
            return ()
        if self.type is bool:
            return ("True", "False")
        return tuple(map(str, get_args(self.type))) if get_origin(self.type) is Literal else ()

    @property
    def choices(self) -> tuple[str, ...]:
        """The values to propose; empty if there are none to propose."""
        names = NAMES.get(self.name.removeprefix("--"), tuple)
        return self.values or tuple(names())

    @property
    def allowed(self) -> str:
        """What the flag takes, in words."""
        if self.switch:
            return "no value"
        if self.values:
            words = ", ".join(self.values)
        elif self.choices:
            words = f"a name, such as {', '.join(self.choices[:4])}"
        else:
            words = TYPE_NAMES.get(self.type, "a value")
        if self.length:
            return f"{self.length} of {words}"
        return f"{words}; or several" if self.several and not self.positional else words

    def accepts(self, value: str) -> bool:
        """Whether `value` has the flag's type."""
        if self.optional and value == "None":
            return True
        if self.values:
            return value in self.values
        try:
            self.type(value)
        except ValueError:
            return False
        return True


def flags_of(takes: type[Any]) -> list[Flag]:
    """All flags and positional arguments of a verb, in the order of their declaration.

    Args:
        takes: the verb's dataclass; fields that are dataclasses themselves are flattened.
    """
    hints = get_type_hints(takes)  # without Annotated's extras
    flags: list[Flag] = []
    for field in fields(takes):
        hint = hints[field.name]
        flags += flags_of(hint) if is_dataclass(hint) else _flags_of_field(field, hint)  # type: ignore[arg-type]
    return flags


def option_names(takes: type[Any]) -> list[str]:
    """The names of a verb's flags, with --help."""
    return [flag.name for flag in flags_of(takes) if not flag.positional] + [HELP]


def find_flag(name: str, takes: type[Any]) -> Flag | None:
    """The flag or positional argument of that name; `-` and `_` in it are the same."""
    name = name.replace("_", "-")
    return next((flag for flag in flags_of(takes) if flag.name.replace("_", "-") == name), None)


def given(args: Sequence[str], takes: type[Any]) -> Iterator[tuple[Flag | None, list[str]]]:
    """Yield each flag in `args` with its values as they were typed, and None with each word that belongs to no flag.

    A flag that the verb does not have is left out.
    """
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not is_flag(word):
            yield None, [word]
            continue
        name, equals, value = word.partition("=")
        flag = find_flag(name, takes)
        if flag is None:
            continue
        values = [value] if equals else []
        while rest and not equals and not is_flag(rest[0]) and (flag.several or not (flag.switch or values)):
            values.append(rest.pop(0))
        yield flag, values


def is_flag(word: str) -> bool:
    """Whether `word` is written like a flag, and not like a negative number or `-` for standard input."""
    if not word.startswith("-") or word == "-":
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def is_required(field: Field[Any]) -> bool:
    """Whether the field of a verb's dataclass has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def _flags_of_field(field: Field[Any], declared: Any) -> list[Flag]:
    hint, optional = _without_none(declared)
    several = get_origin(hint) is tuple
    length = 0 if not several or Ellipsis in get_args(hint) else len(get_args(hint))
    if several:
        hint = get_args(hint)[0]
    if is_required(field):
        return [Flag(field.name, hint, several=several, required=not several)]
    name = field.name.replace("_", "-")
    if declared is bool:  # bool | None takes its value as a word
        return [Flag(f"--{prefix}{name}", bool, switch=True) for prefix in ("", "no-")]
    return [Flag(f"--{name}", hint, optional=optional, several=several, length=length)]


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The type in `hint` that is not None, and whether None is allowed too."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    options = get_args(hint)
    return next(option for option in options if option is not type(None)), type(None) in options
