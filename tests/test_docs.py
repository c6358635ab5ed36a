"""Docs that a stranger can follow: links lead somewhere, commands have the options they name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.metadata import version as installed
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from checkout import needs_git
from command_line import options_of
from packaging.requirements import Requirement

from echo_trt import __version__

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_have_these_options(page):
    for block in FENCE.finditer(page.read_text()):
        for line in re.findall(r"\becho-trt ([a-z]+ (?:[^\n]*\\\n)*[^\n]*)", block[0]):
            name, *words = shlex.split(line.replace("\\\n", " "), comments=True)
            known = options_of(name)
            assert {word for word in words if re.match(r"-{1,2}[a-z]", word)} <= known, line


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart-gpu.md", "docs/migrating.md"])
def test_a_first_run_reads_files_that_exist(name):
    commands = "".join(match[0] for match in FENCE.finditer((ROOT / name).read_text()))
    files = re.findall(r"(?:--prompts |\b)((?:[\w-]+/)*[\w-]+\.jsonl|build/\S+\.yaml|scripts/[\w/.-]+)", commands)
    assert [file for file in files if not (ROOT / file).exists()] == []
    assert "REPOSITORY" not in commands


def test_agents_in_a_terminal_get_what_their_proofs_use():
    page = (ROOT / "docs/agents.md").read_text().partition("## Agents in a terminal")[2].partition("## An edit")[0]
    parts = [ROOT / "scripts/proofs/clients.py", *(ROOT / "scripts/proofs/clients_parts").glob("*.py")]
    used = "".join(part.read_text() for part in parts)
    given = [match[0] for match in FENCE.finditer(page)]
    names = {
        name for block in given for name in re.findall(r"\b[A-Z_]{8,}(?==)|^\w+(?= = )|(?<=\")\w+(?=\":)", block, re.M)
    }
    assert len(names) > 15
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", used)] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_rows_of_a_table_have_its_columns(page):
    rows = re.sub(r"`[^`\n]*`|\\\|", "", FENCE.sub("", page.read_text("utf-8"))).split("\n")
    for above, row in pairwise(rows):
        assert not above.startswith("|") or not row.startswith("|") or above.count("|") == row.count("|"), row


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
def test_the_queries_of_a_log_run(tmp_path):
    """Those of the page about p99, on ten requests of one key and one of another."""
    row = {"message": "request finished", "prompt_tokens": 5, "completion_tokens": 11, "queue_ms": 1.2}
    rows = [{**row, "key": 1 + (i == 10), "first_token_ms": 21.2 + i, "total_ms": 221.2 + i} for i in range(11)]
    (tmp_path / "log.json").write_text("\n".join(map(json.dumps, [{"message": "serving"}, *rows])))
    queries = re.findall(r"^\$ (jq .*?log\.json)$", (ROOT / "docs/p99.md").read_text(), re.MULTILINE | re.DOTALL)
    parts, keys = (subprocess.check_output(["bash", "-c", one], cwd=tmp_path, text=True) for one in queries)
    assert parts.split() == ["queue", "1", "prefill", "30", "per", "token", "20"]
    assert keys.split() == ["1", "10", "50", "1.2", "30.2", "2", "1", "5", "1.2", "31.2"]


def test_a_page_installs_the_torch_that_is_declared():
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]
    [bound] = [line for line in declared["optional-dependencies"]["torch"] if line.startswith("torch>")]
    page = (ROOT / "docs/quickstart-gpu.md").read_text()
    assert f"pip install '{bound}' " in page
    requirement = Requirement(bound)
    assert requirement.specifier.contains(installed("torch").split("+")[0])
    assert not requirement.specifier.contains("2.14.0")
    assert "tensorrt-llm" not in declared["optional-dependencies"]


def test_the_lab_is_this_version_s_and_brings_what_compiles():
    lab = tomllib.loads((ROOT / "lab" / "pyproject.toml").read_text())["project"]
    assert lab["version"] == __version__
    assert lab["dependencies"] == [f"echo-trt[bench]=={__version__}", "httpx>=0.27"]


def test_the_citation_is_this_version_s_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["references"][0]["url"].endswith("2604.09603")


@needs_git
def test_code_names_pages_that_exist():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if name.endswith((".py", ".pbtxt", ".toml", ".yaml")) or "Dockerfile" in name:
            for page in re.findall(r"\bdocs/[\w/-]+\.md", (ROOT / name).read_text()):
                assert (ROOT / page).exists(), (name, page)
