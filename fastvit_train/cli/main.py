"""Entry point of the command line: runs one verb, and turns its errors into one line and an exit status."""

import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvit_train import __version__
from fastvit_train.cli import crash
from fastvit_train.cli.overview import overview
from fastvit_train.cli.parser import parse
from fastvit_train.cli.verbs import DEFAULT_VERB, SCRIPT, VERBS, verb_types
from fastvit_train.config.synonyms import suggestion
from fastvit_train.distributed import env
from fastvit_train.distributed.openmp import limit_spinning
from fastvit_train.utils.console import Terminal
from fastvit_train.utils.errors import Interrupted, Preempted, UserError

PACKAGE = "fastvit_train"
ABOUT = ("-h", "--help", "help", "--version")
"""arguments that print the help or the version instead of running a verb"""
LOST_ANOTHER_RANK = (
    "another process of this run has ended; if it reports no error, it was killed, for example because memory ran out"
)
UNEXPECTED_ERROR_STATUS = 1
USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130
"""128 + SIGINT, as shells report it"""
BROKEN_PIPE_STATUS = 141
"""128 + SIGPIPE"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb, or `train` if none is named.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: with one line on stderr and status 2 for a user's mistake, 1 for any other error, 75 for a run that
            a signal or Ctrl-C stopped, 130 for Ctrl-C in any other verb, 141 if the reader of the output has exited.
    """
    limit_spinning()
    _configure_logging()
    _open_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    verb = args.pop(0) if args and (not args[0].startswith("-") or args[0] in ABOUT) else DEFAULT_VERB
    try:
        with env.only_valid(), crash.stop_on_thread_errors(_print_error):
            status = _run(verb, args)
        sys.stdout.flush()
    except UserError as error:
        if not error.on_all_ranks or env.is_rank0():
            _print_error(str(error))
        status = USER_ERROR_STATUS
    except (Preempted, Interrupted) as stopped:
        if env.is_rank0():
            _print_error(str(stopped), "stopped")
        status = stopped.exit_status
    except BrokenPipeError:  # the program that reads the output, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports the pipe again when it exits
        status = BROKEN_PIPE_STATUS
    except Exception as error:
        if crash.lost_another_rank(error):
            _print_error(LOST_ANOTHER_RANK, "stopped")
        else:
            _print_error(crash.describe(error))
        status = UNEXPECTED_ERROR_STATUS
    except KeyboardInterrupt:
        if env.is_rank0():
            _print_error("interrupted")
        status = INTERRUPTED_STATUS
    if status:
        sys.exit(status)


def _run(verb: str, args: list[str]) -> int:
    """Run a verb, or print the help or the version; returns the exit status."""
    if verb in ABOUT:
        if env.is_rank0():
            _print_about(verb)
        return 0
    if any("\0" in arg for arg in args):
        raise UserError("an argument contains a null byte; a name can't contain one")
    if "" in args:
        raise UserError("an argument is empty; leave it out, or check that a variable in it is set")
    if verb not in VERBS:
        hint = suggestion(verb, VERBS, verbs=True)
        raise UserError(f"unknown verb {verb!r}{f' ({hint})' if hint else ''}; allowed: {', '.join(VERBS)}")
    takes, run_verb = VERBS[verb]
    command = parse(verb, takes, args, program=_program(), verbs=list(VERBS), console_outputs=env.is_rank0())
    return run_verb(command) or 0


def _configure_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # On a CPU machine, torch.compile would first warn that it found no CUDA runtime.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _open_streams() -> None:
    """Replace closed standard streams, and escape characters that a stream's encoding cannot represent."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _print_about(flag: str) -> None:
    if flag == "--version":
        print(f"{PACKAGE} {__version__}")
    else:
        Terminal().print(overview(_program(), verb_types()))


def _print_error(message: str, kind: str = "error") -> None:
    print(f"{PACKAGE}: {kind}: {message}", file=sys.stderr)
    if env.under_launcher():
        print(
            "(the traceback below comes from the launcher; `python -m fastvit_train` prints only the line above)",
            file=sys.stderr,
        )


def _program() -> str:
    """The program as the user called it."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else f"python -m {PACKAGE}"
