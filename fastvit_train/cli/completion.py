"""Completion of the command line in a shell: the script that the parser generates, and additions to it."""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, Literal, Union, get_origin, get_type_hints

import tyro

from fastvit_train.cli.flags import NAMES, find_flag, flags_of
from fastvit_train.cli.overview import summary

Shell = Literal["bash", "zsh", "fish"]
Verbs = Mapping[str, type[Any]]

INSTALL: dict[Shell, str] = {
    "bash": "{program} completion bash > ~/.local/share/bash-completion/completions/{program}",
    "zsh": "{program} completion zsh > ~/.{program}.zsh\n#   echo 'source ~/.{program}.zsh' >> ~/.zshrc",
    "fish": "{program} completion fish > ~/.config/fish/completions/{program}.fish",
}

# tyro's function understands `--flag value`, but not `--flag=value`, which bash splits into three words. If nothing
# matches, it returns one empty word, which would delete what was typed instead of completing a file name.
BASH_ADDITION = """
_{program}() {{
    [[ ${{COMP_WORDS[COMP_CWORD]}} != = ]] || COMP_WORDS+=('') COMP_CWORD=$((COMP_CWORD + 1))
    if [[ ${{COMP_WORDS[COMP_CWORD-1]}} == = ]]; then
        COMP_WORDS=("${{COMP_WORDS[@]:0:COMP_CWORD-1}}" "${{COMP_WORDS[@]:COMP_CWORD}}") COMP_CWORD=$((COMP_CWORD - 1))
    fi
    _tyro_{program}
    [[ -n ${{COMPREPLY[0]}} ]] || COMPREPLY=()
}}
complete -o bashdefault -o default -F _{program} {program}
"""
# tyro's script ends by calling its function, as a file in $fpath does; this script is sourced instead.
ZSH_ADDITION = """
_{program}() {{ _tyro_{program} || _files }}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}
compdef _{program} {program}
"""
FISH_ADDITION = """
complete --command {program} --force-files --condition '__fish_seen_subcommand_from {file_verbs}; \
and not string match --quiet -- "-*" (commandline -opc)[-1]'
"""


def script(shell: Shell, program: str, verbs: Verbs, default_verb: str) -> str:
    """Write the script that completes verbs, flags, choices, names and files.

    Args:
        verbs: the verbs' dataclasses by name.
        default_verb: the verb whose flags are completed if no verb was typed.
    """
    first, _, rest = _parser_script(shell, program, verbs, default_verb).rstrip("\n").partition("\n")
    install = INSTALL[shell].format(program=program)
    head = f"{first}\n# To install this completion of {program} in {shell}:\n#   {install}\n"
    if shell == "zsh":
        rest = rest.rpartition("\n")[0]
    files = [name for name, takes in verbs.items() if any(f.positional and not f.choices for f in flags_of(takes))]
    addition = {"bash": BASH_ADDITION, "zsh": ZSH_ADDITION, "fish": FISH_ADDITION}[shell]
    return head + rest + addition.format(program=program, file_verbs=" ".join(files))


def _parser_script(shell: Shell, program: str, verbs: Verbs, default_verb: str) -> str:
    types = {name: (_with_names(takes), summary(takes)) for name, takes in verbs.items()}
    default, _ = types[default_verb]
    root = make_dataclass("Root", [("verb", _subcommands(types))], bases=(default,), frozen=True, kw_only=True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        tyro.cli(
            root,
            prog=program,
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.PositionalRequiredArgs),
        )
    return output.getvalue()


def _with_names(takes: type[Any]) -> type[Any]:
    """Return a subclass of a dataclass that declares, for each setting in `NAMES`, the names to propose.

    A subclass, because tyro reads the help lines from the source of the class that declares a field first.
    """
    hints = get_type_hints(takes)  # without Annotated: inside it, tyro does not see that a str may be a path
    own = [_field_with_names(declared, hints[declared.name], takes) for declared in fields(takes)]
    return make_dataclass(takes.__name__, own, bases=(takes,), frozen=True, kw_only=True)


def _field_with_names(declared: Field[Any], hint: Any, takes: type[Any]) -> tuple[str, Any, Any]:
    if is_dataclass(hint):
        section = _with_names(hint)  # type: ignore[arg-type]
        return declared.name, section, field(default_factory=section)
    if declared.default is MISSING:
        flag = find_flag(declared.name, takes)
        if flag is not None and flag.choices:
            # tyro completes subcommands, but not positional arguments.
            hint = _subcommands({name: (make_dataclass("Nothing", []), name) for name in flag.choices})
        return declared.name, hint, field()
    if declared.name in NAMES:
        names: Any = Literal[tuple(NAMES[declared.name]())]
        hint = tuple[names, ...] if get_origin(hint) is tuple else names | None if declared.default is None else names
    return declared.name, hint, field(default=declared.default)


def _subcommands(types: Mapping[str, tuple[type[Any], str]]) -> Any:
    """The type of a choice between subcommands.

    Args:
        types: a dataclass and a description by the subcommand's name.
    """
    return Union[  # noqa: UP007 the types are known only when this runs
        tuple(
            Annotated[takes, tyro.conf.subcommand(name, description=text, prefix_name=False)]
            for name, (takes, text) in types.items()
        )
    ]
