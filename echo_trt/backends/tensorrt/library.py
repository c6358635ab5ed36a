"""TensorRT's Python module: its version, our plugins in it, and its messages."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict

from echo_trt.errors import UserError
from super_tree_attention.tensorrt_plugin import register

MAJOR = 11  # the version that is supported


class TensorRTFacts(BaseModel):
    """Names the version of TensorRT and the compute capabilities, such as 8.9, of an engine."""

    model_config = ConfigDict(extra="forbid")

    version: str
    capabilities: list[str]


def load_tensorrt() -> ModuleType:
    """Import TensorRT's Python module and register our plugin; a missing one or another version is refused."""
    run = "run pip install -e '.[tensorrt]' in the repository"
    remedy = f"{run}, or echo-trt build the bundle with --engine cpu."
    try:
        module = importlib.import_module("tensorrt")
        version = module.__version__
    except Exception as error:  # a wheel without its libraries may raise anything
        raise UserError(f"TensorRT is not installed ({error}); {remedy}") from error
    if version.split(".")[0] != str(MAJOR):
        raise UserError(f"TensorRT is version {version}, and echo-trt needs version {MAJOR}; {remedy}")
    try:
        register()
    except ImportError as error:
        raise UserError(f"the plugin for TensorRT cannot be loaded ({error}); {run}.") from error
    return module


def first_sentence(messages: Sequence[str]) -> str:
    """Cut the first message, without its place in the compiler's sources, to the end of a sentence."""
    text = " ".join((messages[0] if messages else "it does not say why").split())
    if "not supported by a dedicated kernel" in text:
        return "it has no attention kernel for this type, number and size of heads"
    text = re.sub(r"^[\w:.]+: Error Code \d+: [\w ]+ \((.*)\)$", r"\1", text)
    text = re.sub(r"^[\w./]+:\d+: ", "", text)
    text = re.sub(r"\[[\w.]+:\d+: \w+\] |\w+Exception: [\w.]+:\d+: ", "", text)
    text = re.split(r"\.? ?\(?In \w+ at /|\s+\(See |\. ", text)[0]
    return text.rstrip(". ")


@cache
def logger_of(api: ModuleType) -> Any:
    """Return the module's logger: a module keeps its first logger for the whole process."""

    class Log(api.ILogger):
        def __init__(self):
            api.ILogger.__init__(self)
            self._file, self._messages = None, []

        def writing_to(self, file):
            self.forget()
            self._file = file
            return self

        def forget(self):
            self._messages = []

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self._file = None

        def log(self, severity, message):
            if severity == api.ILogger.VERBOSE:
                return
            name = str(severity).rpartition(".")[2]
            self._messages.append((name, message))
            if self._file:
                self._file.write(f"{name}: {message}\n")

        def warnings(self) -> list[str]:
            return [message for name, message in self._messages if name == "WARNING"]

        def errors(self) -> list[str]:
            return [message for name, message in self._messages if name in ("ERROR", "INTERNAL_ERROR")]

    return Log()
