"""Completion of the command line in a shell: a script, made of what the verbs are declared to take."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from fastvit_train.cli.flags import HELP, Flag, flags_of, options
from fastvit_train.cli.overview import summary

Shell = Literal["bash", "zsh", "fish"]
Verbs = Mapping[str, type[Any]]
Answer = tuple[str, tuple[str, ...]]
"""a pattern of words, and what is proposed behind them"""
DEFAULT_VERB = "train"
SEEN = "__fish_seen_subcommand_from"

BASH = """\
# Completion of {program} in bash. To install it:
#   {program} completion bash > ~/.local/share/bash-completion/completions/{program}
{function}
complete -o bashdefault -o default -F _{program} {program}
"""

ZSH = """\
# Completion of {program} in zsh. To install it:
#   {program} completion zsh > ~/.{program}.zsh
#   echo 'source ~/.{program}.zsh' >> ~/.zshrc
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
{function}
complete -o bashdefault -o default -F _{program} {program}
"""

# Where no words are found, the shell completes files.
FUNCTION = """\
_{program}() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} verb={default} words=
    if [[ $cur == = ]]; then cur=
    elif [[ $prev == = ]]; then prev=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    if [[ $COMP_CWORD -gt 1 && ${{COMP_WORDS[1]}} != -* ]]; then verb=${{COMP_WORDS[1]}}; fi
    if [[ $cur == -* ]]; then
        case "$verb" in
{flags}
        esac
    elif [[ $COMP_CWORD -eq 1 ]]; then
        words={verbs}
    else
        case "$verb $prev" in
{values}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}"""

FISH = """\
# Completion of {program} in fish. To install it:
#   {program} completion fish > ~/.config/fish/completions/{program}.fish
{lines}
"""


def script(shell: Shell, program: str, verbs: Verbs) -> str:
    """The script that completes `program` in `shell`: verbs, flags, and what is proposed for them.

    Args:
        verbs: what each takes, by name.
    """
    writers: dict[Shell, Callable[[str, Verbs], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return writers[shell](program, verbs)


def _bash(program: str, verbs: Verbs) -> str:
    return BASH.format(program=program, function=_function(program, verbs))


def _zsh(program: str, verbs: Verbs) -> str:
    return ZSH.format(program=program, function=_function(program, verbs))


def _function(program: str, verbs: Verbs) -> str:
    """The function that answers in bash, and in zsh, which understands it."""
    values: list[Answer] = []
    arguments: list[Answer] = []
    for verb, takes in verbs.items():
        own = [flag for flag in flags_of(takes) if not flag.switch]
        values += [(shlex.quote(f"{verb} {flag.name}"), flag.choices) for flag in own if not flag.positional]
        arguments += [(f"{shlex.quote(f'{verb} ')}*", flag.choices) for flag in own if flag.positional]
    return FUNCTION.format(
        program=program,
        default=DEFAULT_VERB,
        verbs=shlex.quote(" ".join(verbs)),
        flags=_cases([(verb, tuple(options(takes))) for verb, takes in verbs.items()]),
        values=f"{_cases(values)}\n{_cases(arguments)}",
    )


def _cases(answers: list[Answer]) -> str:
    """Branches of a `case`, those with the same answer together."""
    patterns: dict[tuple[str, ...], list[str]] = {}
    for pattern, words in answers:
        patterns.setdefault(words, []).append(pattern)
    return "\n".join(
        f"            {' | '.join(alike)}) words={shlex.quote(' '.join(words))} ;;" for words, alike in patterns.items()
    )


def _fish(program: str, verbs: Verbs) -> str:
    return FISH.format(program=program, lines="\n".join(_fish_lines(program, verbs)))


def _fish_lines(program: str, verbs: Verbs) -> Iterator[str]:
    for verb, takes in verbs.items():
        words = f"-f -a {shlex.quote(verb)} -d {shlex.quote(summary(takes))}"
        yield f"complete -c {program} -n __fish_use_subcommand {words}"
    others = " ".join(verb for verb in verbs if verb != DEFAULT_VERB)
    for verb, takes in verbs.items():
        seen = f"not {SEEN} {others}" if verb == DEFAULT_VERB else f"{SEEN} {verb}"
        for words in (f"-l {HELP[2:]}", *map(_fish_flag, flags_of(takes))):
            yield f"complete -c {program} -n {shlex.quote(seen)} {words}"


def _fish_flag(flag: Flag) -> str:
    words = shlex.quote(" ".join(flag.choices))
    if flag.positional:
        return f"-f -a {words}" if flag.choices else "-F"
    if flag.switch:
        return f"-l {flag.name[2:]}"
    return f"-l {flag.name[2:]} {f'-x -a {words}' if flag.choices else '-r'}"
