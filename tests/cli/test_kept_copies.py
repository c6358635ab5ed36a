"""The compiled copy of a GGUF file: whatever becomes of it, it is made anew, and the text is right."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from damage import INSIDE, PLACED, a_fifo, a_folder, some_bytes
from gguf import GGMLQuantizationType
from models.checkpoints import qwen3
from models.gguf_files import GGUF_SIZES, write_gguf

from echo_trt.bundle.manifest import sha256
from echo_trt.cli.app import SEAL, _is_whole


@pytest.fixture
def copy(bundle_of, tmp_path):
    folder = Path(shutil.copytree(bundle_of("lookup"), tmp_path / "copy"))
    (folder / SEAL).write_text(sha256(folder / "manifest.json"))
    assert _is_whole(folder)
    return folder


@pytest.mark.parametrize("way", [*INSIDE, *PLACED], ids=lambda way: way.__name__)
def test_damage_to_any_file_of_a_copy_is_seen(way, copy, tmp_path):
    for number, file in enumerate(sorted(copy.iterdir())):
        other = Path(shutil.copytree(copy, tmp_path / f"of-{file.name}")) / file.name
        way(other, random.Random(number))
        changed = not other.is_file() or other.is_symlink() or other.read_bytes() != file.read_bytes()
        assert _is_whole(other.parent) == (not changed or file.name == "costs.json")


def test_a_damaged_copy_is_made_anew_with_one_sentence(tmp_path):
    file = write_gguf(tmp_path / "own.gguf", qwen3(**GGUF_SIZES), GGMLQuantizationType.Q8_0)
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "1000",
    }
    words = ["generate", file, "the cat", "--max-tokens", "12", "--temperature", "0", "--kv-cache-memory", "0.1"]

    def generated() -> tuple[str, str]:
        command = [sys.executable, "-m", "echo_trt", *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout.splitlines()[-1], " ".join(done.stderr.split())  # without the card of a first start

    expected, said = generated()
    assert "made anew" not in said
    [copy] = (tmp_path / "cache" / "echo-trt").iterdir()
    draw = random.Random(0)
    some_bytes(copy / "target.cpu", draw)
    text, said = generated()
    assert (text, said.count(f"{copy} is damaged; it is made anew from {file}.")) == (expected, 1)
    a_folder(copy / "costs.json", draw)
    text, said = generated()
    assert (text, said.count("costs.json cannot be written")) == (expected, 1)
    a_fifo(copy, draw)
    text, said = generated()
    assert (text, said.count("made anew")) == (expected, 1)
