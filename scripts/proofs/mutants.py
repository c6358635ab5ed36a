"""Changes the package at a random place, again and again, and sees whether its tests notice; lists what they do not.

    python scripts/proofs/mutants.py --minutes 30 --seed 1 speculation engine grammar

Works on a copy of the checkout; the minutes begin once the unchanged tests have passed. A mutant is tried with the
tests of its package that import its module, then with those of ``TESTS``, then, with --whole, with all tests of the
package: a survivor of less may be killed by more. Only with --whole is ``adapters/triton`` changed, which servers'
tests see. Needs pip install -e '.[test]' -e ./lab 'cosmic-ray>=8.4,<9', whose operators make the mutants. Exit
code 1 where one survived.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.testing import run_tests
from cosmic_ray.work_item import TestOutcome

ROOT = Path(__file__).resolve().parents[2]
#: Package -> tests that see most of it soon.
TESTS = {
    "grammar": ["tests/grammar"],
    "speculation": ["tests/speculation"],
    "engine": [
        f"tests/engine/test_{name}.py" for name in ("sampler", "text", "prefix_cache", "guided", "sources", "core")
    ],
    "engine/service": ["tests/engine/service/test_service.py", "tests/engine/service/test_service_overlap.py"],
}
SECONDS = 400  # of tests; a mutant that takes longer hangs, which is noticed
UNSEEN = ("core/RemoveDecorator",)  # operators whose mutants differ in speed or types alone

Mutant = tuple[Path, str, int]  # file, operator, occurrence


class _Unannotated(ast.NodeTransformer):
    """Drops annotations, and that a dataclass is frozen, which nothing reads at run time."""

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        return ast.keyword("frozen", ast.Constant(None)) if node.arg == "frozen" else node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = ast.Constant(None)
        return node


def meaning(code: str) -> str:
    """Return what a module does, as text that annotations and layout do not change."""
    return ast.dump(_Unannotated().visit(ast.parse(code)))


def indices(file: Path) -> Iterator[list[Mutant]]:
    """Yield the mutants of each place of a file."""
    tree, found = get_ast(file.read_text()), defaultdict(list)
    for name in plugins.operator_names():
        operator = plugins.get_operator(name)
        if name in UNSEEN or operator.arguments():
            continue
        positions = (at for node in ast_nodes(tree) for at in operator().mutation_positions(node))
        for occurrence, (begin, _) in enumerate(positions):
            found[begin].append((file, name, occurrence))
    yield from found.values()


def made(mutant: Mutant) -> str | None:
    """Return the code of a mutant; None where it does what the original does, or cannot be parsed."""
    file, name, occurrence = mutant
    code = file.read_text()
    changed = mutate_code(code, plugins.get_operator(name)(), occurrence)
    try:
        return changed if changed and meaning(changed) != meaning(code) else None
    except (SyntaxError, ValueError):
        return None


def survives(copy: Path, package: str, file: Path, whole: bool) -> bool:
    """Return whether no test of ``copy`` fails."""
    dotted = ".".join(file.relative_to(copy).with_suffix("").parts)
    naming = [
        test for test in sorted((copy / "tests" / package).rglob("test_*.py")) if f"{dotted} import" in test.read_text()
    ]
    if not whole:
        naming = [test for test in naming if "served import" not in test.read_text()]  # they start servers
    tests = [
        *(str(test.relative_to(copy)) for test in naming),
        *TESTS[package],
        *([f"tests/{package}"] if whole else []),
    ]
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *dict.fromkeys(tests)]
    return run_tests(" ".join(words), SECONDS)[0] == TestOutcome.SURVIVED


def difference(file: Path, name: str, changed: str) -> str:
    """Return the lines of a mutant that differ."""
    lines = difflib.unified_diff(file.read_text().splitlines(), changed.splitlines(), lineterm="", n=0)
    return "\n".join([f"{file.name} ({name})", *(line for line in lines if line[:3] not in ("---", "+++"))])


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("packages", nargs="*", default=list(TESTS), help=f"of {', '.join(TESTS)}; all of them")
    options.add_argument("--minutes", type=float, default=30.0, help="after which no other mutant is tried")
    options.add_argument("--seed", type=int, default=0, help="of the sample")
    options.add_argument("--whole", action="store_true", help="try what survives with all tests of its package")
    requested = options.parse_args()
    unknown = [name for name in requested.packages if name not in TESTS]
    if unknown:
        options.error(f"package {unknown[0]!r} has no tests here; choose from {', '.join(TESTS)}")
    draw = random.Random(requested.seed)
    survivors, outcomes = [], Counter()
    with tempfile.TemporaryDirectory(prefix="echo-trt-mutants-") as folder:
        copy = Path(folder) / "copy"
        names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        os.chdir(copy)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(copy), str(copy / "plugins")])
        files = [file for package in requested.packages for file in sorted((copy / "echo_trt" / package).rglob("*.py"))]
        files = [file for file in files if requested.whole or file.parent.name != "triton"]
        for package in requested.packages:
            if not survives(copy, package, copy / "echo_trt" / package / "__init__.py", requested.whole):
                sys.exit(f"the tests of {package} fail without a mutant; fix them first.")
        mutants = [(file, at) for file in files for at in indices(file)]
        draw.shuffle(mutants)
        print(f"{len(mutants)} places of {len(files)} files", flush=True)
        end = time.monotonic() + 60 * requested.minutes
        for file, choices in mutants:
            if time.monotonic() > end:
                break
            mutant = draw.choice(choices)
            changed = made(mutant)
            if changed is None:
                continue
            package, code = file.relative_to(copy).parts[1], file.read_text()
            shown = difference(file, mutant[1], changed)
            file.write_text(changed)
            try:
                survived = survives(copy, package, file, requested.whole)
            finally:
                file.write_text(code)
            outcomes[package, survived] += 1
            print(f"{'SURVIVED' if survived else 'killed'} {package}/{shown}", flush=True)
            survivors += [f"{package}/{shown}"] * survived
    for package in requested.packages:
        killed, alive = outcomes[package, False], outcomes[package, True]
        print(f"{package}: {killed} of {killed + alive} killed")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
