"""The examples, run as they stand on small pairs. tests/engine/service runs the one that needs a server."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pairs import LIMITS, raw_recipe, recipe_of

from echo_trt.cli.app import main
from echo_trt.cli.build import build

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(*words: object, cwd: Path = ROOT, text: str = "") -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_offline(bundle_of):
    answers = run(sys.executable, EXAMPLES / "offline.py", bundle_of("close"))
    assert answers.count("tokens per verification]") == 6
    assert answers.count("The capital of France is") == 2


def test_chat(networks, tmp_path):
    build(recipe_of("close", networks, limits=LIMITS | {"context": 480, "kv_blocks": 32}), networks, tmp_path / "close")
    words = sys.executable, EXAMPLES / "chat.py", tmp_path / "close"
    assert run(*words, text="the theme\nand then\n").count("it:  ") == 2


@pytest.mark.parametrize("name", ["chain", "confident"])
def test_a_policy_in_one_file_writes_plain_decoding_s_text(name, bundle_of, tmp_path):
    """The example's in each command that takes a file but ``serve``, and that of docs/write-a-policy.md."""
    page = (ROOT / "docs/write-a-policy.md").read_text()
    text, *_ = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "confident.py").write_text(text)
    chain = ["--policy-file", EXAMPLES / "chain_policy.py" if name == "chain" else tmp_path / "confident.py"]
    prompts, trees, figures = (tmp_path / name for name in ("p.jsonl", "trees.npz", "figures.json"))
    prompts.write_text("".join(f'{{"id": "{i}", "prompt": "the theme {i}"}}\n' for i in range(8)))
    bundle = shutil.copytree(bundle_of("close"), tmp_path / "close")
    echo = Path(sys.executable).with_name("echo-trt")
    words = ["--prompts", prompts, "--max-tokens", 24, "--json", figures]
    run(echo, "generate", bundle, *words, *chain, "--policy", name, "--compare")
    rows = json.loads(figures.read_text())["summary"]
    assert rows["policy"] == name
    assert rows["accepted_length"] > 1
    if name == "confident":  # the other commands take any file alike
        return
    run(echo, "bench", bundle, *words, *chain, "--policies", name, "--batch", "1,2", "--rounds", 1, "--record", trees)
    rows = [row for row in json.loads(figures.read_text())["results"] if row["policy"] == name]
    assert [row["same_texts"].split(" of ")[0] for row in rows] == [row["same_texts"].split(" of ")[1] for row in rows]
    words = ["--prompts", prompts, "--max-tokens", 24]
    run(echo, "calibrate", bundle, *words)
    words = ["--calibration", bundle / "calibration.json", "--machine", "h100-qwen3-8b", "--batch", 1, "--tokens", 200]
    run(echo, "simulate", trees, *words, *chain, "--policies", name, "--static", "2,2,4", "--json", figures)
    assert {row["policy"] for row in json.loads(figures.read_text())["results"]} == {"autoregressive", name}


def test_the_python_of_its_page(bundle_of):
    [program] = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/python-api.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert "bundles/smollm2-135m" in program
    assert run(sys.executable, "-c", program.replace("bundles/smollm2-135m", str(bundle_of("close")))).strip()


#: What the shell does with a command of own_head.md here: it writes its words down, expanded.
TOLD = """
tell() { python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"; }
python() { tell python "$@"; }
echo-trt() { tell echo-trt "$@"; }
"""


def run_here(words: list[str]) -> None:
    """Run a command of the example to its SystemExit."""
    with pytest.MonkeyPatch.context() as patch:
        if words[0] == "echo-trt":
            patch.setattr(sys, "argv", words)
            main()
        script = ROOT / words[1]
        patch.setattr(sys, "argv", words[1:])
        patch.syspath_prepend(script.parent)
        runpy.run_path(str(script), run_name="__main__")


def test_own_head(networks, tmp_path, monkeypatch):
    """Its lines, shortened: a target of one layer, a few tokens for each prompt, and a second of training.

    The shell expands them, and its ``sed`` runs. The commands run in this process, one after another: starting Python
    and importing PyTorch for each of the seven would take most of the time.
    """
    lines = re.findall(r"^```\n(.*?)^```", (EXAMPLES / "own_head.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    for usual, short in (
        ("TARGET=checkpoints/my-model ", f"TARGET={networks / 'small'} "),
        ("--minutes 60", "--minutes 0.02 --draft-vocab 150 --loss-rows 40"),
        ("--prompts $PROMPTS", "--max-tokens 12 --prompts $PROMPTS"),
    ):
        assert usual in lines
        lines = lines.replace(usual, short)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"id": "{i}", "prompt": "the theme {i}"}}\n' for i in range(12)))
    head = {"kind": "eagle3", "source": {"path": "heads/untrained"}}
    recipe = raw_recipe("eagle3", networks, target={"path": str(networks / "small")}, draft=head)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    commands = [json.loads(words) for words in run("bash", "-euc", TOLD + lines, cwd=tmp_path).splitlines()]
    assert [words[0] for words in commands].count("python") == 4
    assert [words[:2] for words in commands if words[0] == "echo-trt"] == [
        ["echo-trt", "build"],
        ["echo-trt", "build"],
        ["echo-trt", "calibrate"],
    ]
    monkeypatch.chdir(tmp_path)
    for words in commands:
        with pytest.raises(SystemExit) as done:
            run_here(words)
        assert not done.value.code, words
    assert (tmp_path / "bundles/mine/calibration.json").exists()
    assert (tmp_path / "heads/mine/ngrams.npz").exists()
