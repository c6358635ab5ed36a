"""The layers of the tests: each test has one, and the pure one needs nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from layers import HEAVY, LAYERS

TESTS = Path(__file__).parent
COLLECT = f"""
import sys
import pytest
assert pytest.main(["--collect-only", "-qq", "-m", "pure", "-p", "no:cacheprovider"]) == 0
print("heavy:", sorted({HEAVY!r} & sys.modules.keys()))
"""


def test_every_folder_that_has_a_layer_exists():
    assert all((TESTS / index).exists() for index in LAYERS)


def test_pure_folders_are_collected_without_a_heavy_import():
    """A run of the pure layer (conftest.py) looks at the imports of its tests, too."""
    command = [sys.executable, "-c", COLLECT]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
