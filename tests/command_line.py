"""What tests of docs and of containers ask about the command line."""

from __future__ import annotations

from echo_trt.cli.app import app


def options_of(command: str) -> set[str]:
    """Return the options of ``echo-trt COMMAND``, or of all its subcommands."""
    found = app[command]
    programs = [found] if found.default_command else [found[name] for name in found if not name.startswith("-")]
    collections = (each.assemble_argument_collection(default_parameter=app.default_parameter) for each in programs)
    return {"--help"} | {name for arguments in collections for argument in arguments for name in argument.names}
