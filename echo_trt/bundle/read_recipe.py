"""Reading of a recipe from its YAML file; a mistake is one sentence that names the key, the value and the file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from echo_trt.bundle.recipe import Recipe
from echo_trt.errors import UserError, shown
from echo_trt.files.inputs import read_text


class _Loader(yaml.SafeLoader):
    """Loads YAML and refuses a key that stands twice, where PyYAML would keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[str] = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in sorted(set(seen), key=seen.index):
            if seen.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe. Raises UserError."""
    try:
        raw = yaml.load(read_text(path), _Loader)
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist; see build/ for examples.") from None
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read ({error.strerror}); name a YAML file.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates that do not exist, endless numbers, no UTF-8
        reason = " ".join(str(error).replace("..", " to ").split())
        raise UserError(f"recipe {path} is not valid YAML: {reason}.") from error
    except RecursionError as error:
        raise UserError(f"recipe {path} is nested too deeply; see build/ for examples.") from error
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path} must hold a mapping of keys to values; see build/ for examples.")
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(error, where)) from error


def _explain(error: ValidationError, where: str) -> str:
    # A misspelt key also leaves the right one missing: name the misspelling.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path = [str(p) for p in first["loc"] if p != "[key]"]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _valid_keys(path[:-1]), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"valid keys there are {', '.join(_valid_keys(path[:-1]))}."
        return f"{where}: unknown key {key}; {hint}"
    if first["type"] == "missing":
        return f"{where}: key {key} is missing; add it."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {key or 'recipe'}: {message}."
    if first["type"] == "invalid_key":
        return f"{where}: a key is {first['input']!r}; keys are words, put it in quotes or leave it out."
    return f"{where}: {key} is {shown(first['input'])}; {message[0].lower()}{message[1:]}."


def _valid_keys(path: list[str]) -> list[str]:
    model: Any = Recipe
    for part in path:
        model = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        for candidate in getattr(model, "__args__", ()):  # Source | None
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields) if model is not None and hasattr(model, "model_fields") else []
