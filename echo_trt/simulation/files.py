"""Files that calibration left, read without the bundle that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from echo_trt.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def read_stored(path: Path, model: type[Model], remedy: str) -> Model:
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"{path} cannot be read ({reason}); {remedy}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {key} is not valid ({first['msg']}); {remedy}.") from error
