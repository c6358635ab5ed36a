"""The layers of the tests: each test has one, and the pure one needs nothing heavy. The package stays small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import pytest
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


@pytest.fixture(scope="module")
def lines_of():
    """Return a function: lines of all modules that some import, lazily too, and that others do not."""
    graph = grimp.build_graph("echo_trt", cache_dir=None, exclude_type_checking_imports=True)

    def imported(modules: tuple[str, ...]) -> set[str]:
        found = set(modules).union(*map(graph.find_upstream_modules, modules))
        return found.union(each.rsplit(".", depth)[0] for each in found for depth in range(1, each.count(".") + 1))

    def count(modules: tuple[str, ...], others: tuple[str, ...] = ()) -> int:
        paths = [TESTS.parent.joinpath(*each.split(".")) for each in imported(modules) - imported(others)]
        files = [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in paths]
        return sum(len(file.read_text("utf-8").splitlines()) for file in files)

    return count


LLM = ("echo_trt", "echo_trt.engine.llm")
SERVER = ("echo_trt.engine.process.__main__", "echo_trt.server.__main__")


@pytest.mark.parametrize(("modules", "others", "limit"), [(LLM, (), 13_750), (SERVER, LLM, 6_010)])
def test_parts_of_the_package_stay_small(lines_of, modules, others, limit):
    """``LLM`` in 12,500 lines, and the default server in 4,500 on top, are wanted; a limit goes down with its part."""
    assert lines_of(modules, others) <= limit


def test_the_package_stays_small():
    """In 24,500 lines, or a tenth more."""
    files = [*(TESTS.parent / "echo_trt").rglob("*.py")]
    assert sum(len(file.read_text("utf-8").splitlines()) for file in files) <= 26_950
