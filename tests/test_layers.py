"""The layers of the tests: each test has one, and the pure one needs nothing heavy. The package stays small."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
from layers import HEAVY, LAYERS

from echo_trt.backends.kind import TORCH
from echo_trt.files.extras import BUILD, ENGINES, registered

TESTS = Path(__file__).parent
COUNTS = runpy.run_path(str(TESTS.parent / "scripts" / "counts.py"))
#: What a machine runs that has bundles.
SERVING = (
    "echo_trt.__main__", "echo_trt.cli.app", "echo_trt.cli.serve", "echo_trt.cli.generate", "echo_trt.engine.llm",
    "echo_trt.engine.process.__main__", "echo_trt.server.__main__", "echo_trt.adapters.triton.model",
    "echo_trt.adapters.triton.host", "echo_trt.adapters.dynamo.command", "echo_trt.adapters.dynamo.replicas",
    "echo_trt.backends.parallel.ranked",
)  # fmt: skip
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


def test_engines_are_named_in_their_folders_alone():
    """But for the engine of a recipe that names none. What differs by engine stands in its ``EngineKind``."""
    names = "|".join(registered(ENGINES))
    named = re.compile(rf"""["']({names})["']|backends\.({names})\b|\.({names})\b|\bengine *(==|!=|not in\b)""")
    package = TESTS.parent / "echo_trt"
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        if package / "backends" not in path.parents
        for line in path.read_text("utf-8").splitlines()
        if named.search(line.replace('torch.device("cpu")', "")) and not line.startswith("DEFAULT_ENGINE = ")
    ]
    assert found == []


def statements(modules: set[str]) -> int:
    paths = [TESTS.parent.joinpath(*each.split(".")) for each in modules]
    files = [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in paths]
    return sum(isinstance(node, ast.stmt) for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))))


def test_the_package_and_its_parts_stay_small():
    """Limits stand 200 statements above what there was at the last release, for a visitor's patch, and sink with it.

    Statements, not lines: nobody shall put two into one. Wanted: 21,900. The attention of the engine ``cpu`` took 110
    that OpenVINO's engine pays for when it leaves.
    """
    graph = grimp.build_graph("echo_trt", cache_dir=None, exclude_type_checking_imports=True)

    def imported(*modules: str) -> set[str]:
        """Return what these import, lazily too, with the packages around it."""
        found = set(modules).union(*map(graph.find_upstream_modules, modules))
        return found.union(each.rsplit(".", depth)[0] for each in found for depth in range(1, each.count(".") + 1))

    llm = imported("echo_trt", "echo_trt.engine.llm")
    assert statements(graph.modules) <= 26_576
    assert statements(llm) <= 11_850
    assert statements(imported("echo_trt.engine.process.__main__", "echo_trt.server.__main__") - llm) <= 7_040


def imports(path: Path, later: bool) -> set[str]:
    """Return the names that a file imports, also those of functions, or those that it imports at once."""
    found, nodes = set[str](), [ast.parse(path.read_text("utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif later or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            nodes += node.orelse if typing else ast.iter_child_nodes(node)
    return found


def reached(*modules: str) -> tuple[set[Path], set[str], set[str]]:
    """Return the files of ours that modules import at once, and other packages: at once, and later, too."""
    todo, seen, at_once, later = [*modules], set[Path](), set[str](), set[str]()
    while todo:
        parts = todo.pop().split(".")
        for path in (TESTS.parent.joinpath(*parts).with_suffix(".py"), TESTS.parent.joinpath(*parts, "__init__.py")):
            if path.exists() and path not in seen:
                seen.add(path)
                found = imports(path, later=False)
                todo += found
                at_once |= {name.partition(".")[0] for name in found}
                later |= {name.partition(".")[0] for name in imports(path, later=True)}
    return seen, at_once, later


def test_serving_and_llm_do_without_what_compiles_and_without_the_lab():
    """What they import at once, with every engine and door, and other packages that those modules import later."""
    lacked = {*BUILD, "echo_trt_lab", "httpx", "matplotlib", "scipy"}
    engines = [f"echo_trt.backends.{name}.engine" for name in registered(ENGINES)]
    seen, _, outside = reached(*SERVING, *engines)
    assert len(seen) > 200
    assert not outside & lacked


def test_serving_a_bundle_of_openvino_does_without_pytorch():
    """What an installation without extras lacks is imported by builds, and by the engines that bring an extra."""
    on_hosts = [module for module in SERVING if not module.startswith("echo_trt.backends.parallel")]
    _, at_once, _ = reached(*on_hosts, "echo_trt.backends.openvino.engine")
    lacked = {*BUILD, *TORCH, "scipy", "matplotlib"}
    assert not at_once & lacked
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert not {re.match("[a-z0-9-]+", line)[0] for line in project["dependencies"]} & lacked


@pytest.mark.parametrize("feature", COUNTS["FEATURES"])
def test_a_feature_stays_behind_its_seam(feature):
    """Limits sink with what there is; scripts/counts.py prints where a feature stands."""
    pattern, maximum = COUNTS["FEATURES"][feature]
    assert len(COUNTS["found"](pattern)) <= maximum


def test_objects_have_few_fields():
    """What more than one room knows of a request is an object of each, one inside another."""
    assert COUNTS["wide_classes"]().keys() <= COUNTS["WIDE"]
