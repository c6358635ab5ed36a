"""Prompt files: one JSON object per line, with ``id`` and ``prompt``, or ``turns`` (``bench --turns`` asks later ones).

Files of MT-bench are read as they are: their ``question_id`` is an id.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from echo_trt.errors import UserError, encodable, shown
from echo_trt.files.inputs import read_lines

MAX_LINES = 1_000_000  # of a file; larger: an endless pipe takes more memory before it is refused
LARGEST = 2**30  # bytes of a file; larger: likewise


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str
    later: tuple[str, ...] = ()  # turns


def read_prompts(path: Path) -> list[Prompt]:
    """Read all prompts of a file. A mistake is refused with its line number at once: a pipe may have no end."""
    prompts: dict[str, Prompt] = {}
    try:
        for prompt in _prompts(path):
            if prompt.id in prompts:
                raise UserError(f"{path}: id {shown(prompt.id)} stands twice; give each prompt an id of its own.")
            prompts[prompt.id] = prompt
    except OSError as error:
        raise UserError(f"prompts file {path} cannot be read ({error.strerror}); name a JSONL file.") from error
    if not prompts:
        raise UserError(f"prompts file {path} holds no prompt; give one JSON object per line.")
    return list(prompts.values())


def _prompts(path: Path) -> Iterator[Prompt]:
    size = 0
    for number, line in enumerate(read_lines(path), 1):
        size += len(line)
        if number > MAX_LINES or size > LARGEST:
            raise UserError(
                f"prompts file {path} has more than {MAX_LINES:,} lines or {LARGEST:,} bytes; give a part of it."
            )
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield _parse(text, f"{path}, line {number}")


def _parse(line: bytes, where: str) -> Prompt:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); give one object per line.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: holds {type(row).__name__}, not an object; give one with id and prompt.")
    text, later = row.get("prompt"), []
    if text is None and isinstance(row.get("turns"), list) and row["turns"]:
        text, *later = row["turns"]
    if not isinstance(text, str) or not text:
        raise UserError(f"{where}: prompt (or the first of turns) must be a string that is not empty.")
    name = row.get("id", row.get("question_id"))
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise UserError(f"{where}: id is {shown(name)}; give a string or a whole number.")
    if not all(isinstance(turn, str) and turn for turn in later):
        raise UserError(f"{where}: turns must be strings that are not empty.")
    turns = tuple(encodable(turn, f"{where}: turns") for turn in later)
    return Prompt(encodable(str(name), f"{where}: id"), encodable(text, f"{where}: prompt"), turns)
