"""What tests of docs and of containers ask about the command line."""

from __future__ import annotations

from echo_trt.cli.app import app


def options_of(command: str) -> set[str]:
    """Return the options of ``echo-trt COMMAND``."""
    arguments = app[command].assemble_argument_collection(default_parameter=app.default_parameter)
    return {"--help"} | {name for argument in arguments for name in argument.names}
