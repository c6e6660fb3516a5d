"""The flags of a verb, read from what it is declared to take: for completion and for mistakes."""

import types
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from timm.optim import list_optimizers

from fastvit_train.config.recipes import RECIPES
from fastvit_train.models import OUR_MODELS
from fastvit_train.models.attention import attentions

HELP = "--help"
IN_WORDS = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}

NAMED: dict[str, Callable[[], Iterable[str]]] = {
    "recipe": lambda: RECIPES,
    "model": lambda: OUR_MODELS,
    "models": lambda: OUR_MODELS,
    "attention": attentions,
    "optimizer": lambda: map(str, list_optimizers()),
}
"""what is a text as far as its type goes, and has names all the same"""


@dataclass(frozen=True)
class Flag:
    """A setting of the command line."""

    name: str
    """as it is typed; a positional argument's without dashes"""
    choices: tuple[str, ...]
    """what is proposed for it; empty where anything may be given"""
    allowed: str
    """what it takes, in words"""
    switch: bool
    """it takes no value"""
    required: bool
    """a positional argument that must be there"""

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")


def flags_of(takes: type[Any]) -> list[Flag]:
    """All that a verb takes, in the order of its declaration, sections flattened."""
    hints = get_type_hints(takes)
    found: list[Flag] = []
    for field in fields(takes):
        hint = hints[field.name]
        found += flags_of(hint) if is_dataclass(hint) else _flags(field, hint)  # type: ignore[arg-type]
    return found


def options(takes: type[Any]) -> list[str]:
    """The names of a verb's flags, --help's among them."""
    return [flag.name for flag in flags_of(takes) if not flag.positional] + [HELP]


def _flags(field: Field[Any], declared: Any) -> list[Flag]:
    hint, several = _bare(declared)
    if field.default is MISSING and field.default_factory is MISSING:
        return [Flag(field.name, *_choices(field.name, hint), switch=False, required=not several)]
    name = field.name.replace("_", "-")
    if declared is bool:  # one that may be None as well takes its value as a word
        return [Flag(f"--{prefix}{name}", (), "no value", switch=True, required=False) for prefix in ("", "no-")]
    choices, allowed = _choices(field.name, hint)
    return [Flag(f"--{name}", choices, f"{allowed}; or several" if several else allowed, switch=False, required=False)]


def _bare(hint: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there may be several."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False


def _choices(name: str, hint: Any) -> tuple[tuple[str, ...], str]:
    """What is proposed, and what is allowed in words."""
    if get_origin(hint) is Literal or hint is bool:
        choices = tuple(map(str, get_args(hint))) or ("True", "False")
        return choices, ", ".join(choices)
    if name in NAMED:
        choices = tuple(NAMED[name]())
        return choices, f"a name, such as {', '.join(choices[:4])}"
    return (), IN_WORDS.get(hint, "a value")
