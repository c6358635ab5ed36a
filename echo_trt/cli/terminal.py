"""The terminal: what commands print on, and how one ends that was given something wrong."""

from __future__ import annotations

import difflib
import os
import re
import sys
from functools import partial
from typing import NoReturn

from cyclopts import App, CycloptsError, UnknownOptionError, UnusedCliTokensError
from rich.console import Console

from echo_trt.errors import StartFailed, UserError, no_memory, shown
from echo_trt.files.extras import check_lab

NARROWEST = 20  # columns of a terminal; larger: more values of COLUMNS are ignored


def _drop_odd_columns() -> None:
    """Remove a COLUMNS below NARROWEST from the environment: Rich would print nothing, not even an error."""
    columns = os.environ.get("COLUMNS", "")
    if not re.fullmatch("[0-9]{2,4}", columns) or int(columns) < NARROWEST:
        os.environ.pop("COLUMNS", None)


_drop_odd_columns()  # before the first console, which remembers them
# Names of files, ids and texts are printed as they are: no markup, no :emoji:.
Screen = partial(Console, markup=False, emoji=False)
messages = Screen(stderr=True)


def run_app(app: App) -> None:
    """Run a command line; a user's mistake is one sentence on stderr and exit code 2, and a failure 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if hasattr(sys.stdout, "reconfigure"):  # not all that stands in for it, as in a notebook, can be
        sys.stdout.reconfigure(errors="replace")  # its encoding may not have every character of an answer
    try:
        _run(app)
    except UserError as error:
        _refuse(error)
    except StartFailed as error:
        _refuse(error, 1)
    except CycloptsError as error:
        _refuse(_sentence(error))
    except MemoryError as error:
        _refuse(no_memory(error))
    except OSError as error:
        # Nothing that is still to be printed is to fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        path = error.filename or "standard output, or a file,"
        _refuse(f"{path} cannot be read or written ({error.strerror or error}); make room, or name another place.")


def _run(app: App) -> None:
    if sys.stdout is None:
        raise UserError("standard output is closed; redirect it to a file or to /dev/null.")
    check_lab("".join(sys.argv[1:2]))
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except SystemExit:
        sys.stdout.flush()
        raise


def _sentence(error: CycloptsError) -> str:
    """Say what is wrong with the words of a command line, and what to write instead."""
    command = " ".join(error.command_chain or ("echo-trt",))
    if isinstance(error, UnusedCliTokensError):
        words = " ".join(error.unused_tokens or ())
        return f"{command} has no use for {shown(words)}; leave it out, or put quotes around a text of several words."
    if isinstance(error, UnknownOptionError):
        option = (error.token.keyword or error.token.value).partition("=")[0]
        known = [name for argument in error.argument_collection for name in argument.names]
        near = difflib.get_close_matches(option, known, 1)
        remedy = f"did you mean {near[0]}?" if near else f"see echo-trt {' '.join(error.command_chain or ())} --help."
        return f"{option} is no option of {command}; {remedy}"
    error.verbose = False
    return str(error)


def _refuse(error: object, code: int = 2) -> NoReturn:
    messages.print("error:", style="bold red", end=" ", soft_wrap=True)
    messages.print(" ".join(str(error).split()), soft_wrap=True, highlight=False)
    sys.exit(code)


def screen_of(color: str) -> Console:
    """Return the console of standard output, with colours even in a file where they are wanted always."""
    if color == "never":
        return Screen(no_color=True)
    if color == "always":
        return Screen(force_terminal=True, no_color=False, color_system=Screen().color_system or "256")
    return Screen()


def wants_colour(console: Console, choice: str) -> bool:
    """Return whether ``--color`` auto, always or never colours what ``console`` prints; NO_COLOR matters to auto."""
    if choice == "auto":
        return console.is_terminal and console.color_system is not None and not console.no_color
    return choice == "always"
