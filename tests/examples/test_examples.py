"""The examples, run as they stand on small pairs. tests/serving runs the one that needs a server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pairs import raw_recipe

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(*words: object, cwd: Path = ROOT, text: str = "") -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_offline(bundle_of):
    answers = run(sys.executable, EXAMPLES / "offline.py", bundle_of("close"))
    assert answers.count("tokens a verification]") == 6
    assert answers.count("The capital of France is") == 2


def test_chat(with_limits):
    bundle = with_limits("close", context=480, kv_blocks=32)
    said = run(sys.executable, EXAMPLES / "chat.py", bundle, text="the theme\nand then\n\n")
    assert said.count("it:  ") == 2


def test_chat_ends_where_its_input_ends(bundle_of):
    assert "it:  " in run(sys.executable, EXAMPLES / "chat.py", bundle_of("close"), text="the theme\n")


def test_readme_s_python(bundle_of):
    [program] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert "bundles/smollm2-135m" in program
    assert run(sys.executable, "-c", program.replace("bundles/smollm2-135m", str(bundle_of("close")))).strip()


@pytest.mark.slow
def test_own_head(networks, tmp_path):
    """Its lines, shortened: a target of one layer, a few tokens for each prompt, and a second of training."""
    lines = re.findall(r"^```\n(.*?)^```", (EXAMPLES / "own_head.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    for usual, short in (
        ("TARGET=checkpoints/my-model ", f"TARGET={networks / 'small'} "),
        ("--minutes 60", "--minutes 0.02 --draft-vocab 150 --loss-rows 40"),
        ("--prompts $PROMPTS", "--max-tokens 12 --prompts $PROMPTS"),
        ("python scripts", f"{sys.executable} {ROOT / 'scripts'}"),
    ):
        assert usual in lines
        lines = lines.replace(usual, short)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"id": "{i}", "prompt": "the theme {i}"}}\n' for i in range(12)))
    head = {"kind": "eagle3", "source": {"path": "heads/untrained"}}
    recipe = raw_recipe("eagle3", networks, target={"path": str(networks / "small")}, draft=head)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run("bash", "-euc", lines, cwd=tmp_path)
    assert (tmp_path / "bundles/mine/calibration.json").exists()
    assert (tmp_path / "heads/mine/ngrams.npz").exists()
