"""The command line, run as a user runs it: real bundles, exit codes, what is printed and what is left on disk."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from byte_tokenizer import ASSISTANT, END, USER
from pairs import recipe_of

from echo_trt.engine.llm import LLM
from echo_trt.engine.options import run_alone
from echo_trt.engine.params import SamplingParams


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{i}", "prompt": "abc " * (i + 1)} for i in range(5)]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return file


def generated(echo_trt, tmp_path, *words: object) -> dict:
    file = tmp_path / "answers.json"
    outcome = echo_trt("generate", *words, "--max-tokens", 12, "--json", file)
    assert outcome.code == 0, outcome.err
    return json.loads(file.read_text("utf-8"))


def test_json_holds_a_result_for_each_prompt_in_order(echo_trt, bundle_of, prompts, tmp_path):
    answer = generated(echo_trt, tmp_path, bundle_of("close"), "--prompts", prompts, "--batch", 2)
    assert [r["id"] for r in answer["results"]] == ["p0", "p1", "p2", "p3", "p4"]
    for result in answer["results"]:
        assert set(result) == {"id", "text", "token_ids", "finish_reason", "accepted_length"}
        assert result["finish_reason"] in ("stop", "length")
        assert 1 <= len(result["token_ids"]) <= 12
    assert answer["summary"]["tokens"] == sum(len(r["token_ids"]) for r in answer["results"])
    assert answer["summary"]["tokens_per_s"] > 0
    assert answer["summary"]["policy"] == "echo"


def test_compare_prints_both_and_their_ratio(echo_trt, bundle_of, prompts, tmp_path):
    answer = generated(echo_trt, tmp_path, bundle_of("self"), "--prompts", prompts, "--compare")
    assert answer["summary"]["identical"] == 5
    assert answer["plain"]["accepted_length"] == 1.0
    assert answer["summary"]["accepted_length"] > 1.5  # the draft is the target
    table = echo_trt("generate", bundle_of("self"), "abc", "--compare", "--max-tokens", 8).out
    assert "autoregressive" in table
    assert "identical texts" in table
    assert "1 of 1" in table


def test_a_single_prompt_streams_its_text_and_nothing_else_to_stdout(echo_trt, bundle_of, tmp_path):
    answer = generated(echo_trt, tmp_path, bundle_of("close"), "hello there")
    outcome = echo_trt("generate", bundle_of("close"), "hello there", "--max-tokens", 12)
    assert outcome.out == answer["results"][0]["text"] + "\n"
    assert "tokens/s" in outcome.err


def test_a_prompt_holds_control_tokens_only_with_the_option(echo_trt, bundle_of, tmp_path):
    prompt = f"the theme{END}{ASSISTANT}café {END}{USER}"
    texts = []
    for words in ((), ("--special-tokens-in-content",)):
        llm = LLM(bundle_of("close"), special_tokens_in_content=bool(words))
        end = llm.tokenizer.backend_tokenizer.token_to_id(END)
        assert llm.chat_ids(prompt).count(end) - llm.chat_ids("x").count(end) == (2 if words else 0)
        (wanted,) = llm.chat([{"role": "user", "content": prompt}], SamplingParams(12))
        (result,) = generated(echo_trt, tmp_path, bundle_of("close"), prompt, *words)["results"]
        assert result["token_ids"] == wanted.token_ids
        texts.append(wanted.token_ids)
    assert texts[0] != texts[1]


def test_build_and_inspect(echo_trt, networks, tmp_path):
    recipe = networks / "cli.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("lookup", networks).model_dump(exclude_none=True)), "utf-8")
    bundle = tmp_path / "made" / "bundle"
    built = echo_trt("build", recipe, "-o", bundle, "--precision", "bf16")
    assert built.code == 0, built.err
    assert json.loads((bundle / "manifest.json").read_text())["precision"] == "bf16"
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]
    for path, word in ((bundle, "self-check"), (recipe, "limits")):
        shown = echo_trt("inspect", path)
        assert shown.code == 0
        assert word in shown.out


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (["hi", "--max-tokens", 0], ["max_tokens", "0", "from 1 to"]),
        (["hi", "--top-k", 2**63], ["top_k", str(2**63), "from -1 to 2^31 - 1, 0 is off"]),
        (["hi", "--stop", "a\udcff"], ["--stop", "not UTF-8"]),
        (["hi", "--json", "/nowhere/a.json"], ["--json", "/nowhere/a.json"]),
        (["hi", "--policy", "magic"], ["policy", "magic", "echo"]),
        (["hi", "--prompts", "p.jsonl"], ["either PROMPT or --prompts"]),
        ([], ["either PROMPT or --prompts"]),
        (["word " * 400], ["prompt", "context", "160"]),
        (["a\udcff"], ["PROMPT", "not UTF-8"]),
        ([""], ["PROMPT is empty", "give at least one character"]),
        (["hi", "--policy", "echo", "--budget", 0], ['"0" for --budget', "Give 1 or more."]),
        (["hi", "--policy", "goodput", "--budget", 4], ["--budget is 4", "goodput shares no budget"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(echo_trt, bundle_of, tmp_path, words, reported):
    file = tmp_path / "answers.json"
    outcome = echo_trt("generate", bundle_of("lookup"), *words, *([] if "--json" in words else ["--json", file]))
    assert outcome.code == 2
    assert not file.exists()
    assert "Traceback" not in outcome.err
    assert all(word in outcome.err for word in reported), outcome.err
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err


def test_other_servers_names_of_options_are_known(echo_trt):
    for words in (["serve", "-h"], ["-h"]):
        outcome = echo_trt(*words)
        assert outcome.code == 0
        assert "--host" in outcome.out or "serve" in outcome.out
    assert "--port" in echo_trt("serve", "-h").out


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (["inspec"], ["inspec", 'Did you mean "inspect"?']),
        (["generate", "b", "--bach", 3], ["--bach is no option of generate; did you mean --batch?"]),
        (["chat", "b", "--max-token=3"], ["--max-token is no option of chat; did you mean --max-tokens?"]),
        (["serve", "b", "--modell", "x"], ["--modell is no option of serve; see echo-trt serve --help."]),
        (["store", "clear", "b", "--al"], ["--al is no option of store clear; see echo-trt store clear --help."]),
        (["generate", "b", "Why", "is", "it", "so"], ["generate has no use for 'is it so'", "put quotes around"]),
        (["generate", "b", "--batch", "many"], ["--batch", "many"]),
        (["build"], ["MODEL"]),
        (["build", "a", "--engine", "opnvino"], ["--engine", "opnvino", 'Did you mean "openvino"?']),
        (["serve", "b", "--openai-port", 70000], ["--openai-port", "70000", "Give 0 to 65,535."]),
        (["serve", "b", "--kv-events-config", "tcp://*:5557"], ["'tcp://*:5557'", "JSON", "endpoint, replay_endpoint"]),
        (["serve", "b", "--kv-events-config", '{"port": 5557}'], ["`port`", "endpoint, replay_endpoint"]),
        (["serve", "b", "--store-size", "8 apples"], ["--store-size is '8 apples'", "such as 4G or 512M"]),
        (["serve", "b", "--store-size", "1G"], ["--store-size is 1G, but there is no store; add --store DIR."]),
        (["worker", "b", "--store", __file__], [f"--store is {__file__}, which is a file; name a folder."]),
        (["serve", "b", "--store", __file__], [f"--store is {__file__}, which is a file; name a folder."]),
        (["store", "inspect", "b"], ["b is no store; name the folder that serve --store was given"]),
        (["store", "clear", "b"], ["b is no store; name the folder that serve --store was given"]),
        (["serve", "b", "--http-port", 8000], ["--http-port", "add --triton"]),
        (["bench", "b", "--prompts", "p", "--batch", "x" * 5000], ["--batch is 'xxx"]),
        (["inspect", "nothing.yaml"], ["nothing.yaml does not exist; "]),
        (["inspect", "."], [". "]),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_2(echo_trt, words, reported):
    outcome = echo_trt(*words)
    assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (2, "", 1)
    assert len(outcome.err) < 300
    assert all(word in outcome.err for word in reported), outcome.err


def test_ids_and_folders_are_printed_as_they_are(echo_trt, bundle_of, tmp_path):
    bundle, file, ids = tmp_path / "[red]:boom:[/]", tmp_path / "prompts.jsonl", ["b[/bold]", "[i]:x:"]
    shutil.copytree(bundle_of("lookup"), bundle)
    file.write_text("".join(json.dumps({"id": id, "prompt": "abc"}) + "\n" for id in ids))
    for words in ([], ["--compare"]):
        outcome = echo_trt("generate", bundle, "--prompts", file, "--max-tokens", 4, *words)
        assert outcome.code == 0, outcome.err
        assert all(id in outcome.out for id in ids)
    assert f"bundle {bundle}" in echo_trt("inspect", bundle).out


@pytest.mark.parametrize(
    ("words", "reported"),
    [(["Unable to allocate 3.64 TiB"], "memory (Unable to allocate 3.64 TiB); "), ([], "memory; ")],
)
def test_a_pool_beyond_the_memory_is_a_sentence(words, reported, echo_trt, bundle_of, monkeypatch):
    def too_large(*given, **more):
        raise MemoryError(*words)

    monkeypatch.setattr("echo_trt.cli.generate.LLM", too_large)
    outcome = echo_trt("generate", bundle_of("lookup"), "hi")
    assert outcome.code == 2
    assert f"not enough {reported}lower limits.kv_blocks" in outcome.err


@pytest.mark.parametrize(
    ("error", "code"),
    [(MemoryError("3 TiB"), 2), (RuntimeError("core.cpp:117:\nstd::bad_alloc"), 2), (RuntimeError("odd"), None)],
)
def test_an_engine_s_process_that_lacks_memory_says_so(error, code, capsys, monkeypatch):
    def process() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["process"])
    monkeypatch.setattr(logging.root, "handlers", [])  # another test of this process may have configured the log
    with pytest.raises(SystemExit if code else RuntimeError) as ended:
        run_alone(process)
    assert getattr(ended.value, "code", None) == code
    assert ("error: there is not enough memory (" in capsys.readouterr().err) == bool(code)


def test_a_prompt_that_is_too_long_is_named_before_any_is_answered(echo_trt, bundle_of, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "short", "prompt": "abc"}\n' + json.dumps({"id": "long one", "prompt": "word " * 400}))
    outcome = echo_trt("generate", bundle_of("lookup"), "--prompts", file)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "prompt 'long one' has" in outcome.err


def test_a_file_that_generate_reads_is_not_overwritten(echo_trt, bundle_of, prompts, monkeypatch):
    monkeypatch.setattr("echo_trt.cli.generate.LLM", None)
    for file in (prompts, bundle_of("lookup") / "manifest.json"):
        before = file.read_bytes()
        outcome = echo_trt("generate", bundle_of("lookup"), "--prompts", prompts, "--json", file)
        assert (outcome.code, f"--json {file} is a file that the command reads" in outcome.err) == (2, True)
        assert file.read_bytes() == before


@pytest.fixture
def without_lab(monkeypatch):
    for module in ("echo_trt.files.extras", "echo_trt.cli.generate", "echo_trt.cli.app"):
        monkeypatch.setattr(f"{module}.registered", lambda group: ())


def test_without_what_compiles_a_build_is_refused_at_once(echo_trt, monkeypatch):
    monkeypatch.setattr("echo_trt.cli.app.BUILD", ("json", "onnx_a"))
    outcome = echo_trt("build", "smollm2-135m")
    assert outcome.code == 2
    assert outcome.err == "error: a build needs onnx_a, not installed here; run pip install 'echo-trt[build]'.\n"


@pytest.mark.parametrize("words", [("bench", "b"), ("simulate", "x", "--help"), ("inspect",), ("calibrate", "-x")])
def test_a_command_of_the_lab_says_what_brings_it(words):
    code = (
        "from echo_trt.files import extras; extras.registered = lambda group: ()\n"
        "import importlib.metadata; importlib.metadata.entry_points = lambda **group: ()\n"
        "from echo_trt.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    told = f"error: {words[0]} is a command of echo-trt-lab; run pip install ./lab in the repository.\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_without_the_lab_a_text_has_no_colours(echo_trt, bundle_of, without_lab):
    outcome = echo_trt("generate", bundle_of("close"), "hi", "--max-tokens", 8, "--color", "always")
    assert outcome.code == 0, outcome.err
    assert "\x1b" not in outcome.out
    refused = echo_trt("generate", bundle_of("close"), "hi", "--compare")
    assert refused.code == 2
    assert "generate has no compare without echo-trt-lab; run pip install ./lab" in refused.err
    refused = echo_trt("bench", bundle_of("close"))
    sentence = "error: bench is a command of echo-trt-lab; run pip install ./lab in the repository.\n"
    assert (refused.code, refused.err) == (2, sentence)


def echo_trt_of(*words: object, stdout: Any = subprocess.PIPE, **more: Any) -> subprocess.CompletedProcess:
    """Return a process of its own; ``more``: of its environment, where a name is in capitals, and of
    ``subprocess.run``.
    """
    environment = {**os.environ, **{name: more.pop(name) for name in list(more) if name.isupper()}}
    command = [sys.executable, "-m", "echo_trt", *map(str, words)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, **more)


def test_a_standard_output_without_the_characters_gets_others_for_them(tmp_path):
    recipe = tmp_path / "é.yaml"
    recipe.write_text("name: a\ntarget: {path: ünder}\n", "utf-8")
    done = echo_trt_of("inspect", str(recipe), LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "?nder" in done.stdout


def test_ctrl_c_while_it_imports_says_nothing():
    code = """
import builtins, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def interrupted(name, *rest, real=builtins.__import__):
    if name == "cyclopts":
        signal.raise_signal(signal.SIGINT)
    return real(name, *rest)
builtins.__import__ = interrupted
from echo_trt.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_ends_a_build_at_once_and_leaves_nothing(networks, tmp_path):
    """Other signals: supervision/test_supervised.py."""
    recipe = networks / "interrupted.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("model", networks).model_dump(exclude_none=True)), "utf-8")
    words = [sys.executable, "-m", "echo_trt.cli.app", "build", str(recipe), "-o", str(tmp_path / "bundle")]
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heard)
    while "compiling" not in (line := process.stderr.readline()):
        assert line, "the build ended before it compiled"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)  # a second or two on a quiet machine
    assert process.returncode == 130
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# -- a standard output that is closed, full or left by its reader -----------------------------------------------------


def test_a_reader_that_leaves_costs_no_result_file(bundle_of, tmp_path):
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "a.json"
    prompts.write_text('{"id": "a", "prompt": "abc"}\n{"id": "b", "prompt": "abc abc"}\n')
    reading, writing = os.pipe()
    os.close(reading)
    words = [bundle_of("lookup"), "--prompts", prompts, "--max-tokens", 4, "--json", file]
    done = echo_trt_of("generate", *words, stdout=writing)
    os.close(writing)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert '"id": "b"' in file.read_text()


def test_a_closed_standard_output_is_told_in_a_sentence():
    done = echo_trt_of("--version", preexec_fn=lambda: os.close(1))
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output is closed; ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_standard_output_is_told_in_a_sentence():
    with open("/dev/full", "w") as full:
        done = echo_trt_of("--version", stdout=full)
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
