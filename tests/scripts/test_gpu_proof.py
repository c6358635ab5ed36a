"""scripts/gpu_proof on a CPU: the same code at tiny sizes, with no more installed than it says it needs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import venv
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

#: In the place of tests of a section: what crashes, fails, passes, is skipped or cannot be collected.
FAULTY = """
import os

def test_first(figures):
    figures(before=1)
    os._exit(7)

def test_second():
    assert 'the card' == 'on fire'

def test_third(card):
    pass
"""
#: Tests of which a section's end finds one in the middle; each writes down that it ran.
SLOW = """
import time, pathlib

def test_first():
    pathlib.Path('ran').write_text('test_first')

def test_second():
    time.sleep(1000)

def test_third():
    pathlib.Path('ran').write_text('test_third')
"""
SKIPPED = "import pytest\n\ndef test_first():\n    pytest.skip('it is not here')\n"
#: File -> a line of it, and what does the same in a way that the proof must not let pass.
FAULTS = {
    "echo_trt/backends/cuda/levels.py": (
        "            beams, children = expand(self._forward, call, level, beams, shape.width)\n",
        "            expand(self._forward, call, level, beams, shape.width)\n"
        "            beams, children = expand(self._forward, call, level, beams, shape.width)\n",
    ),
    "echo_trt/backends/torch/engine.py": (
        "self._operator(query, key, value, *pools, *metadata, sliding_window=window)",
        "[self._operator(query, key, value, keys := pools[0].clone(), pools[1], *metadata, sliding_window=window), "
        "pools[0].copy_(keys)][0]",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """Of the repository, as one would take it to another machine; with what is compiled, which takes a while."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("echo_trt", "plugins", "lab", "build", "scripts", "tests/gpu", "tests/plugins", "tests/backends"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.pyc.*", "*.tmp.*"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def from_the_page() -> list[str]:
    """Return what the page's own line installs for the proof, without versions."""
    page = (ROOT / "docs/quickstart-gpu.md").read_text()
    [line] = re.findall(r"^pip install (?!-e)(.*)$", page, re.MULTILINE)
    return [Requirement(word).name for word in shlex.split(line)]


def needed_by(names: list[str]) -> dict[str, metadata.Distribution]:
    """Return the installed distributions of ``names``, and those that they need. Without a card some are not here."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(name), "") for name in names]
    while todo:
        name, extra = each = todo.pop()
        if each in seen:
            continue
        seen.add(each)
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.distribution(name)
            for wanted in map(Requirement, found[name].requires or ()):
                if not wanted.marker or wanted.marker.evaluate({"extra": extra}):
                    todo += [(canonicalize_name(wanted.name), one) for one in ("", *wanted.extras)]
    return found


@pytest.fixture(scope="module")
def page_python(tmp_path_factory) -> Path:
    """Make an environment that holds what the page's line installs and nothing else, as links; return its Python."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    for distribution in needed_by(from_the_page()).values():
        for file in distribution.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                link = packages / file
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(Path(file.locate()).resolve())
    return folder / "bin" / "python"


@pytest.fixture
def run(page_python):
    return partial(_run, page_python)


def _run(python: Path, copy: Path, *options: str, tensorrt: str = "", **env: str) -> subprocess.CompletedProcess:
    """``tensorrt``: the tests of that section."""
    if tensorrt:
        (copy / "tests/gpu/test_gpu_tensorrt.py").write_text(tensorrt)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    command = [python, copy / "scripts" / "gpu_proof", *options]
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_on_a_cpu_every_section_is_walked_and_a_failure_and_a_crash_end_no_other(run, copy):
    """A section without TensorRT is skipped, which takes no walk to see: its tests are others here."""
    done = run(copy, "--cpu-interpret", "--out", "report.md", tensorrt=FAULTY)
    report = (copy / "report.md").read_text()
    assert done.returncode == 1, done.stdout + done.stderr + report
    assert done.stdout.splitlines()[-1] == (
        "a section failed: smoke walked in part, serving walked, kernel walked in part, engine walked, "
        "tensorrt failed, ranks walked in part; read the report."
    )
    assert "# GPU proof: none, Triton's interpreter on a CPU" in report
    assert "AssertionError: assert 'the card' == 'on fire'" in report
    sections = json.loads((copy / "report.json").read_text())["sections"]
    assert {name: section["verdict"] for name, section in sections.items()} == {
        "smoke": "walked in part",
        "serving": "walked",
        "kernel": "walked in part",
        "engine": "walked",
        "tensorrt": "failed",
        "ranks": "walked in part",
    }
    assert all(f"## {section}\n" in report for section in sections)
    reported = {row["test"].partition("::")[2]: row["figures"] for row in sections["serving"]["tests"]}
    rates = reported["test_drafts_are_what_gates_let_pass_at_every_load"]
    assert all(rates[f"{name} at 2"]["tokens_per_s"] > 0 for name in ("autoregressive", "static", "echo", "goodput"))
    texts = reported["test_every_policy_writes_plain_decodings_text[float32]"]
    assert texts["echo"]["same"] == texts["echo"]["of"] == 2
    rows = sections["tensorrt"]["tests"]
    assert [row["verdict"] for row in rows] == ["failed", "failed", "walked"]
    assert "passed" not in report  # what needs a card
    assert rows[0]["figures"] == {"before": 1}


@pytest.mark.slow
def test_levels_that_are_computed_again_and_a_cache_that_is_copied_fail(run, copy):
    kept = {}
    for file, (right, wrong) in FAULTS.items():
        kept[file] = (copy / file).read_text()
        assert kept[file].count(right) == 1
        (copy / file).write_text(kept[file].replace(right, wrong))
    chosen = {"PYTEST_ADDOPTS": "-k 'drafts or copies'"}
    done = run(copy, "--cpu-interpret", "--only", "serving", "--out", "faults.md", **chosen)
    for file, text in kept.items():
        (copy / file).write_text(text)
    assert done.returncode == 1, done.stdout + done.stderr
    tests = json.loads((copy / "faults.json").read_text())["sections"]["serving"]["tests"]
    drafts, copies = (row["reason"] for row in tests if row["verdict"] == "failed")
    assert "levels are computed again" in drafts
    assert "a cache is copied: ['aten.clone.default', 'aten.copy_.default']" in copies


@pytest.mark.parametrize(
    ("tests", "code", "reported"),
    [
        (SKIPPED, 3, "it is not here"),
        ("import what_is_not_there\n", 3, "nothing was proved: tensorrt skipped; install what_is_not_there, and run"),
        ("import echo_trt.what_is_not_there\n", 1, "No module named 'echo_trt.what_is_not_there'"),
        ("import echo_trt.what_is_not_there\n", 1, "a section failed"),
    ],
)
def test_a_section_that_is_skipped_or_cannot_be_collected(run, copy, tests, code, reported):
    done = run(copy, "--cpu-interpret", "--only", "tensorrt", tensorrt=tests)
    assert done.returncode == code, done.stderr
    assert reported in (copy / "gpu_proof.md").read_text()


@pytest.mark.parametrize("limit", ["0.5", "9"])
def test_a_section_that_is_cut_short_says_what_has_run(run, copy, limit):
    """Whatever the machine has managed by then."""
    (copy / "ran").unlink(missing_ok=True)
    done = run(copy, "--cpu-interpret", "--only", "tensorrt", "--limit", limit, tensorrt=SLOW)
    rows = json.loads((copy / "gpu_proof.json").read_text())["sections"]["tensorrt"]["tests"]
    found = {row["test"].partition("::")[2]: row["verdict"] for row in rows}
    assert done.returncode == 3
    if found == {"": "not run"}:  # not even collected
        return
    assert list(found) == ["test_first", "test_second", "test_third"]
    assert found["test_third"] == "not run"
    assert found["test_second"] in ("not run", "not finished")
    if found["test_first"] == "walked":
        assert (copy / "ran").read_text() == "test_first"


script = runpy.run_path(str(ROOT / "scripts" / "gpu_proof"))


def rows(*verdicts: str) -> list[dict]:
    return [{"test": f"file::test_{number}", "verdict": verdict} for number, verdict in enumerate(verdicts)]


WHOLE = {"kernel": rows("passed"), "engine": rows("passed"), "serving": rows("passed", "passed")}


@pytest.mark.parametrize(
    ("sections", "code", "sentence"),
    [
        (
            WHOLE | {"ranks": rows("skipped")},
            0,
            r"proved on this GPU: .* Take --engine torch on this card; Tensor.* not",
        ),
        (WHOLE | {"tensorrt": rows("passed")}, 0, "TensorRT passed, too"),
        (WHOLE | {"ranks": rows("failed")}, 1, "a section failed: .*; take --engine torch"),
        (WHOLE | {"serving": rows("failed")}, 1, "a section failed: .*; docs/quickstart-gpu.md, When the proof fails"),
        (WHOLE | {"kernel": rows("passed", "not run")}, 4, r"proved in part: .* missing: of kernel test_1 \(not run\)"),
        (WHOLE | {"engine": rows("passed", "skipped")}, 4, r"missing: of engine test_1 \(skipped\)"),
        (WHOLE | {"serving": rows("passed", "not finished")}, 4, r"missing: of serving test_1 \(not finished\)"),
        ({"kernel": rows("passed")}, 4, "missing: engine, which was not chosen; serving, which was not chosen"),
        (
            {"kernel": rows("skipped"), "engine": rows("not run")},
            3,
            "nothing was proved: kernel skipped, engine not run",
        ),
        ({"kernel": rows("walked")}, 3, "nothing was proved: kernel walked, on a CPU; "),
    ],
)
def test_the_exit_code_is_0_only_where_all_that_serves_was_proved(sections, code, sentence):
    got, output = script["outcome"](sections)
    assert got == code
    assert re.search(sentence, output)


def test_an_older_python_is_refused_before_anything_is_imported(copy):
    """By this Python under an older one's number: what an older one lacks is not looked for."""
    code = (
        "import runpy, sys; sys.version_info = (3, 10, 13); sys.modules['argparse'] = None; runpy.run_path(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, copy / "scripts" / "gpu_proof"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: Python is \S+; make the environment with 3\.11 or newer\.\n", done.stderr)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(run, copy):
    done = run(copy)
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
