"""JSON files beside a bundle's manifest, which are checked as they are read, and written whole."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from echo_trt.errors import UserError, first_mistake
from echo_trt.files.inputs import read_text

CALIBRATION = "calibration.json"
Count = Annotated[int, Field(ge=0)]


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=_Stored)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, also where two processes write it."""
    partial = partial_name(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")  # apart from other processes' files


def write(folder: Path, name: str, stored: _Stored) -> None:
    write_whole(folder / name, f"{stored.model_dump_json(indent=1)}\n".encode())


def read_stored(path: Path, model: type[Model], remedy: str) -> Model:
    try:
        return model.model_validate_json(read_text(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; {remedy}.") from error
    except ValidationError as error:
        raise UserError(f"{path}: {first_mistake(error)}; {remedy}.") from error
