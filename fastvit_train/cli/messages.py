"""What to say of an argument that a verb doesn't take, or takes otherwise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvit_train.cli.flags import HELP, Flag, flags_of, options
from fastvit_train.utils.errors import did_you_mean, nearest

EXAMPLES = {"run": "runs/NAME", "repo": "USER/NAME"}
"""of positional arguments, by name; of others the name itself"""


def unknown_flag(args: Sequence[str], verb: str, takes: type[Any]) -> str | None:
    """Of the first flag that the verb doesn't know; None where it knows all of them."""
    known = options(takes)
    for arg in args:
        name = arg.partition("=")[0].replace("_", "-")
        if name.startswith("-") and not _is_number(name) and name not in (*known, "-h", "-", "--"):
            close = nearest(name, known)
            if Path(arg).exists():
                return f"{arg} is taken for a flag; write ./{arg}"
            hint = f"did you mean {' or '.join(close)}?" if close else f"{verb} {HELP} lists what there is"
            return f"unknown flag {arg.partition('=')[0]}; {hint}"
    return None


def unknown_argument(arg: str, args: Sequence[str], verbs: Sequence[str], verb: str, takes: type[Any]) -> str:
    """Of a word that belongs to no flag."""
    before = args[args.index(arg) - 1] if arg in args[1:] else next((a for a in args if a.endswith(f"={arg}")), "")
    flag = _find(before, takes)
    if flag is not None and flag.switch:
        bare = flag.name.removeprefix("--no-").removeprefix("--")
        return f"{flag.name} takes no value; leave {arg} out, as in --{bare}, or --no-{bare} for the opposite"
    if arg in verbs:
        return f"unknown argument {arg}; a verb comes first: {arg} {' '.join(a for a in args if a != arg)}"
    close = nearest(f"--{arg}", options(takes), most=1)
    hint = f"did you mean {close[0]}?" if close else f"{verb} {HELP} lists what there is"
    return f"unknown argument {arg}; {hint}"


def missing_argument(verb: str, takes: type[Any]) -> str:
    """Of a verb that was given less than it takes."""
    needed = [flag for flag in flags_of(takes) if flag.positional and flag.required]
    names = " and ".join(f"a {flag.name}" for flag in needed)
    example = " ".join(
        flag.choices[0] if flag.choices else EXAMPLES.get(flag.name, flag.name.upper()) for flag in needed
    )
    allowed = "".join(f"; allowed: {flag.allowed}" for flag in needed if flag.choices)
    return f"{verb} takes {names}, as in: {verb} {example}{allowed}"


def missing_value(name: str, takes: type[Any]) -> str:
    """Of a flag at the end of the line, or before another."""
    flag = _find(name, takes)
    return f"{name} takes a value; allowed: {flag.allowed if flag else 'anything'}"


def wrong_value(name: str, value: str, takes: type[Any]) -> str:
    """Of a value that the flag doesn't take."""
    flag = _find(name, takes)
    if flag is None:
        return f"{name} {value!r} is not allowed; {HELP} lists what is"
    return f"{name} {value!r} is not allowed{did_you_mean(value, flag.choices)}; allowed: {flag.allowed}"


def value_of(name: str, args: Sequence[str]) -> str:
    """What stands behind a flag, as it was typed."""
    for place, arg in enumerate(args):
        flag, _, value = arg.partition("=")
        if flag.replace("_", "-") == name:
            rest = [value] if value else args[place + 1 :]
            end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
            return " ".join(rest[:end])
    return ""


def _find(name: str, takes: type[Any]) -> Flag | None:
    name = name.partition("=")[0].replace("_", "-")
    return next((flag for flag in flags_of(takes) if flag.name.replace("_", "-") == name), None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
