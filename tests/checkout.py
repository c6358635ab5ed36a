"""Whether git knows the commit of these sources, which an archive of them does not say."""

import shutil
from pathlib import Path

import pytest

needs_git = pytest.mark.skipif(
    not (shutil.which("git") and (Path(__file__).parents[1] / ".git").exists()), reason="needs git, and a clone"
)
