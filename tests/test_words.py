"""The field's words: old names stay away, also in prose, and a name has one meaning."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = sorted([*ROOT.glob("echo_trt/**/*.py"), *ROOT.glob("lab/**/*.py"), *ROOT.glob("plugins/**/*.py")])
DOCS = sorted(path for path in ROOT.glob("docs/**/*.md") if path.name not in ("lab-notes.md", "benchmarks.md"))
#: Names that had several meanings or none outside this project -> the field's.
NAMES = {
    "accuse": "engine_failed",
    "asked": "requested",
    "bank": "feature_cache",
    "behind": "draft_lag, following",
    "blank": "dummy_inputs",
    "catch_up": "prefill_draft",
    "emission": "step_output",
    "foresee": "predict",
    "guilty": "faulty",
    "judge": "reweight",
    "least": "minimum, min_...",
    "most": "maximum, max_...",
    "onlooker": "recorder",
    "place": "position, slot, index, path",
    "places": "positions, slots, indices, paths",
    "portion": "expansion_size",
    "promise": "acceptance_ema",
    "rival": "challenger",
    "rung": "verification_size",
    "rungs": "verification_sizes",
    "said": "history, delta, output",
    "serial": "epoch",
    "settling": "warm_up",
    "told": "reported",
}
#: Those of NAMES that comments and docstrings have no other use for.
IN_PROSE = ("accuse", "bank", "foresee", "guilty", "judge", "onlooker", "portion", "rival", "rung", "settling")
#: Words of this project alone -> what readers know.
PRIVATE = {
    "default pair": "default model",
    "departed": "disconnected",
    "free nodes": "candidates that need no draft pass",
    "open answer": "request in flight",
    "pending token": "last token",
    "restless": "noisy",
    "stand-ins": "mocks",
    "texts part": "texts diverge",
}


def test_names_are_the_field_s():
    found: dict[str, str] = {}
    for path in CODE:
        tokens = list(tokenize.generate_tokens(io.StringIO(path.read_text()).readline))
        names = {token.string.lower() for token in tokens if token.type == tokenize.NAME}
        prose = " ".join(
            token.string for token in tokens if token.type == tokenize.COMMENT or token.string[:3] == '"""'
        )
        words = set(re.findall(r"[a-z]+", prose.lower()))
        old = sorted(names & NAMES.keys()) + [name for name in IN_PROSE if {name, f"{name}s"} & words]
        found |= {f"{name} in {path.relative_to(ROOT)}": f"write {NAMES[name]}" for name in old}
    assert found == {}


def _defined(module: ast.Module) -> Iterator[str]:
    """Yield the names of classes, and of the type aliases of a module."""
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef):
            yield node.name
    for node in module.body:
        names = [each.id for each in getattr(node, "targets", ()) if isinstance(each, ast.Name)]
        yield from (name for name in names if name[0].isupper() and not name.isupper())


def test_a_class_or_alias_is_defined_once():
    defined: dict[str, list[str]] = {}
    for path in CODE:
        for name in _defined(ast.parse(path.read_text())):
            defined.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in defined.items() if len(paths) > 1} == {}


def test_pages_have_words_that_readers_know():
    texts = {path.name: " ".join(path.read_text().split()) for path in DOCS}
    found = {page: word for page, text in texts.items() for word in PRIVATE if word in text}
    assert found == {}, f"write {', '.join(PRIVATE[word] for word in found.values())}"


def test_users_are_told_to_fix():
    pages = [*ROOT.glob("echo_trt/server/page/*.js"), *ROOT.glob("scripts/**/*.py"), *CODE, *DOCS]
    assert [str(path.relative_to(ROOT)) for path in pages if re.search(r"\bmend", path.read_text())] == []
