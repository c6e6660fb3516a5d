"""Error messages for arguments that a verb does not take."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvit_train.cli.flags import HELP, Flag, find_flag, flags_of, given, is_flag, option_names
from fastvit_train.config.synonyms import suggestion
from fastvit_train.utils.errors import did_you_mean

EXAMPLES = {"run": "runs/NAME", "repo": "USER/NAME"}
"""example values of positional arguments; for any other, the example is its name in capitals"""


def explain(args: Sequence[str], verb: str, takes: type[Any], verbs: Sequence[str]) -> str:
    """Describe the first mistake in arguments that the parser has rejected.

    tyro reports a mistake only as a box that it draws for people. This function does not read that box; it compares
    the arguments with the declared flags.

    Args:
        args: the arguments after the verb.
        takes: the verb's dataclass.
        verbs: the names of all verbs.
    """
    if unknown := _unknown_flag(args, verb, takes):
        return unknown
    positional = [flag for flag in flags_of(takes) if flag.positional]
    missing = [flag for flag in positional if flag.required]
    for flag, values in given(args, takes):
        if flag is None:
            flag = positional[0] if positional else None
            if flag is None:
                return _unknown_argument(values[0], args, verb, takes, verbs)
            if not flag.several:
                positional.pop(0)
                missing.remove(flag)
        elif flag.switch and values:
            return _switch_with_value(flag, values[0])
        elif not values and not flag.switch:
            return missing_value(flag)
        for value in values:
            if not flag.accepts(value):
                return _wrong_value(flag, value)
        if flag.length and len(values) != flag.length:
            return f"{flag.name} takes {flag.length} values, not {len(values)}; allowed: {flag.allowed}"
    return _missing_arguments(verb, takes) if missing else f"the arguments cannot be read; see {verb} {HELP}"


def missing_value(flag: Flag) -> str:
    """Describe a flag that no value follows."""
    return f"{flag.name} takes a value; allowed: {flag.allowed}"


def _unknown_flag(args: Sequence[str], verb: str, takes: type[Any]) -> str | None:
    """Describe the first flag that the verb does not have; None if it has all of them."""
    known = option_names(takes)
    for arg in args:
        name = arg.partition("=")[0]
        if is_flag(arg) and name.replace("_", "-") not in (*known, "-h", "--"):
            if Path(arg).exists():
                return f"{arg} is read as a flag; for the file of that name write ./{arg}"
            return f"unknown flag {name}; {suggestion(name.replace('_', '-'), known) or _see_help(verb)}"
    return None


def _unknown_argument(arg: str, args: Sequence[str], verb: str, takes: type[Any], verbs: Sequence[str]) -> str:
    """Describe a word that belongs to no flag."""
    before = find_flag(args[args.index(arg) - 1], takes) if arg in args[1:] else None
    if before is not None and before.switch:
        return _switch_with_value(before, arg)
    if arg in verbs:
        return f"unknown argument {arg}; a verb comes first: {arg} {' '.join(a for a in args if a != arg)}"
    return f"unknown argument {arg}; {suggestion(f'--{arg}', option_names(takes), most=1) or _see_help(verb)}"


def _see_help(verb: str) -> str:
    return f"{verb} {HELP} lists the flags"


def _switch_with_value(flag: Flag, value: str) -> str:
    name = flag.name.removeprefix("--no-").removeprefix("--")
    return f"{flag.name} takes no value; leave {value} out, as in --{name}, or --no-{name} for the opposite"


def _wrong_value(flag: Flag, value: str) -> str:
    return f"{flag.name} {value!r} is not allowed{did_you_mean(value, flag.choices)}; allowed: {flag.allowed}"


def _missing_arguments(verb: str, takes: type[Any]) -> str:
    """Describe a verb that was given fewer positional arguments than it takes."""
    needed = [flag for flag in flags_of(takes) if flag.positional and flag.required]
    names = " and ".join(f"a {flag.name}" for flag in needed)
    example = " ".join(
        flag.choices[0] if flag.choices else EXAMPLES.get(flag.name, flag.name.upper()) for flag in needed
    )
    allowed = "".join(f"; allowed: {flag.allowed}" for flag in needed if flag.choices)
    return f"{verb} takes {names}, as in: {verb} {example}{allowed}"
