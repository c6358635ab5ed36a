"""Machine code that is kept for later processes: whatever becomes of its files, functions compute the same."""

from __future__ import annotations

import random
import runpy

import numba
import pytest
from damage import INSIDE, PLACED, gone

from echo_trt.speculation import arrays

MODULE = """
from echo_trt.speculation.arrays import compiled

@compiled()
def twice(number):
    return 2 * number

@compiled("i8(i8)")
def answer(number):
    return twice(number)
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return what runs a module as a later process does, and says whether its code was taken from a file."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    path = tmp_path / "module.py"
    path.write_text(MODULE)

    def load() -> bool:
        arrays._report.cache_clear()
        function = runpy.run_path(str(path))["answer"]
        assert function(21) == 42
        return sum(function.stats.cache_hits.values()) == 1

    assert not load()
    return load


@pytest.mark.parametrize("way", [*INSIDE, *PLACED], ids=lambda way: way.__name__)
def test_damaged_code_is_compiled_again(way, load, tmp_path, caplog):
    assert load()
    for number, kind in enumerate(("nbi", "nbc")):
        [file] = tmp_path.glob(f"__pycache__/module.answer*.{kind}")
        before = file.read_bytes()
        way(file, random.Random(number))
        changed = not file.is_file() or file.is_symlink() or file.read_bytes() != before
        assert changed or way.__name__ == "other_order"  # of one page
        caplog.clear()
        assert load() == (not changed)
        assert [record.getMessage() for record in caplog.records] == (
            ["machine code that was kept is damaged or an earlier version's; it is compiled again."]
            if changed and way is not gone
            else []
        )
        assert load()


def test_code_without_a_seal_is_compiled_again(load, tmp_path):
    for file in tmp_path.glob("__pycache__/*.nb?"):
        file.write_bytes(file.read_bytes()[:-32])
    assert not load()
    assert load()


def test_a_folder_that_cannot_be_written_costs_time_alone(load, tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays._SealedFiles, "_open_for_write", full)
    for file in tmp_path.glob("__pycache__/*.nbi"):
        file.write_bytes(b"")
    assert not load()
