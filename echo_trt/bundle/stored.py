"""JSON files beside a bundle's manifest, which are checked as they are read."""

from __future__ import annotations

import contextlib
import os
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


def write(folder: Path, name: str, stored: _Stored) -> None:
    """Write a file that appears whole or not at all, also where two processes write it."""
    partial = folder / f".{name}.{os.urandom(4).hex()}.partial"
    try:
        partial.write_text(stored.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / name)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def read_stored(path: Path, model: type[Model], remedy: str) -> Model:
    try:
        return model.model_validate_json(read_text(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; {remedy}.") from error
    except ValidationError as error:
        raise UserError(f"{path}: {first_mistake(error)}; {remedy}.") from error
