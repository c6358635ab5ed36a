"""docs/img/: every picture is there, is what the script draws, and is shown somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "img"
SCRIPT = ROOT / "scripts" / "pictures.py"
WRITTEN = re.compile(r"<!-- (.*) -->")  # matplotlib's own notes of what its letters spell


def test_plots_are_those_of_the_stored_figures(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--folder", tmp_path], check=True)
    drawn = sorted(tmp_path.iterdir())
    assert [file.name for file in drawn] == ["drafted.svg", "gates.svg", "iteration.svg", "speedup.svg"]
    for file in drawn:
        assert WRITTEN.findall(file.read_text()) == WRITTEN.findall((IMAGES / file.name).read_text())


def test_every_picture_is_shown_somewhere():
    pages = "".join(page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
    for file in IMAGES.iterdir():
        if file.suffix in (".svg", ".png"):
            assert f"img/{file.name})" in pages, file
