"""A bundle that a test may break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def bundle(bundle_of, tmp_path) -> Path:
    """Return a copy that a test may break."""
    return Path(shutil.copytree(bundle_of("model"), tmp_path / "bundle"))
