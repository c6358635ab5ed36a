"""docs/img/: every picture is there, is what the script draws, and is shown somewhere."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "img"
SCRIPT = ROOT / "scripts" / "pictures.py"
SVG = "{http://www.w3.org/2000/svg}"
WRITTEN = re.compile(r"<!-- (.*) -->")  # matplotlib's own notes of what its letters spell


def test_plots_are_those_of_the_stored_figures(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "plots", "--folder", tmp_path], check=True)
    drawn = sorted(tmp_path.iterdir())
    assert [file.name for file in drawn] == ["drafted.svg", "gates.svg", "iteration.svg", "speedup.svg"]
    for file in drawn:
        assert WRITTEN.findall(file.read_text()) == WRITTEN.findall((IMAGES / file.name).read_text())


def test_every_picture_is_shown_somewhere():
    pages = "".join(page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
    for file in IMAGES.iterdir():
        if file.suffix in (".svg", ".png"):
            assert f"img/{file.name})" in pages, file


def test_a_film_plays_by_itself_and_ends_with_what_was_printed(bundle_of, tmp_path, monkeypatch):
    from echo_trt_lab.images import recording

    for name in ("smollm2-135m", "smollm2-135m-fp32"):
        (tmp_path / name).symlink_to(bundle_of("close"))
    monkeypatch.setattr("echo_trt_lab.race.FRAMES", 1000)
    monkeypatch.setattr(recording, "FRAMES", 8)
    root = ElementTree.parse(io.StringIO(recording.record(tmp_path, 12))).getroot()
    groups = [group for group in root.iter(f"{SVG}g") if group.get("class")]
    assert [group.get("class") for group in groups[-1:]] == ["last"]
    frames = groups[:-1]
    assert 1 < len(frames) <= 8
    assert all(group.get("display") == "none" for group in frames)  # a viewer that plays nothing shows the last
    assert all(group.find(f"{SVG}animate") is not None for group in groups)
    lines = {group.get("id"): "".join(group.itertext()) for group in root.iter(f"{SVG}g") if group.get("id")}
    shown = [" ".join(lines[use.get("href")[1:]] for use in group.iter(f"{SVG}use")) for group in groups]
    assert all("tokens/s" in text for text in shown)
    assert "╭" in shown[0]
    assert shown[-1].count(", same text") == 6
    assert "The same texts came" in shown[-1]
    assert not list(root.iter(f"{SVG}script"))
