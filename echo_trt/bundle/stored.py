"""JSON files beside a bundle's manifest, which are checked as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from echo_trt.errors import UserError, first_mistake
from echo_trt.files.inputs import read_text
from echo_trt.files.outputs import write_whole

CALIBRATION = "calibration.json"
Count = Annotated[int, Field(ge=0)]


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=_Stored)


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
