"""scripts/gpu_proof on a CPU: the same code at tiny sizes, with no more installed than it says it needs."""

import importlib
import importlib.util
import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
SECTIONS = ("kernel", "engine", "serving", "curves", "speed", "lossless", "tensorrt", "ranks")
#: What echo-trt may use elsewhere, and a bare GPU machine may lack.
MISSING = ("openvino", "nncf", "transformers", "tokenizers", "safetensors", "onnx", "onnxscript", "gguf", "scipy",
           "matplotlib", "cyclopts", "rich", "jinja2", "llguidance", "tensorrt", "tensorrt_rtx")  # fmt: skip


def run(copy: Path, *options: str) -> subprocess.CompletedProcess:
    program = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({MISSING!r}))\n"
        f"sys.argv = {['gpu_proof', *options]!r}\n"
        f"runpy.run_path({str(copy / 'scripts/gpu_proof')!r}, run_name='__main__')\n"
    )
    return subprocess.run([sys.executable, "-I", "-c", program], cwd=copy, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path) -> Path:
    """Of the repository, as one would take it to another machine; with what is compiled, which takes a while."""
    for folder in ("echo_trt", "plugins", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.pyc.*", "*.tmp.*"))
    return tmp_path


def test_on_a_cpu_every_section_is_walked_or_skipped_and_nothing_is_proved(copy):
    done = run(copy, "--cpu-interpret", "--out", "report.md")
    report = (copy / "report.md").read_text()
    assert done.returncode == 3, done.stdout + done.stderr + report
    assert done.stdout.splitlines()[-1] == (
        "nothing was proved: 7 walked, 1 skipped, on a CPU; run it on a machine with an NVIDIA GPU."
    )
    for section in SECTIONS:
        assert f"| {section} | {'skipped' if section == 'tensorrt' else 'walked'} |" in report
        assert f"## {section}\n" in report
    assert "passed" not in report
    assert "| float32 | echo | 2 of 2 |" in report
    assert "**SKIPPED**: tensorrt cannot be used here (" in report
    told = json.loads((copy / "report.json").read_text())
    assert {name: section["verdict"] for name, section in told["sections"].items()} == {
        name: "skipped" if name == "tensorrt" else "walked" for name in SECTIONS
    }
    checks = {check["name"] for section in told["sections"].values() for check in section["checks"]}
    assert {
        "graphs compute what launches do",
        "a draft's catch-up computes each chunk on its own inputs",
        "draft levels in one graph are those of launches",
        "costs have no part of a graph's capture",
    } <= checks
    runs = told["sections"]["serving"]["figures"]["runs"]
    assert [(run["batch"], run["policy"]) for run in runs] == [
        (batch, policy) for batch in (1, 3) for policy in ("autoregressive", "static", "echo", "goodput")
    ]
    assert all(run["rate"] > 0 and 0 <= run["host"] <= 1 for run in runs)
    assert max(run["accepted"] for run in runs) > 1.5


def test_a_failure_is_told_and_the_other_sections_go_on(copy):
    kernel = copy / "plugins/super_tree_attention/kernel.py"
    text = kernel.read_text()
    kernel.write_text(text.replace("1.4426950408889634 * HEAD_DIM**-0.5", "1.3 * HEAD_DIM**-0.5"))
    assert kernel.read_text() != text
    (copy / "scripts/proofs/gpu_proof_parts/speed.py").write_text(
        "def prove(proof):\n    raise OSError('the card is on fire')\n"
    )
    done = run(copy, "--cpu-interpret", "--only", "kernel,speed,tensorrt")
    report = (copy / "gpu_proof.md").read_text()
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "a section failed: 2 failed, 1 skipped."
    assert "**FAILED**: error " in report
    assert "**FAILED**: OSError: the card is on fire" in report
    assert "| tensorrt | skipped |" in report


@pytest.fixture
def parts(monkeypatch) -> Callable[[str], ModuleType]:
    """name -> that module of scripts/proofs/gpu_proof_parts."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "proofs"))
    return lambda name: importlib.import_module(f"gpu_proof_parts.{name}")


@pytest.mark.parametrize(
    ("verdicts", "code", "sentence"),
    [
        (["passed"] * 6, 0, "proved on this GPU: 6 passed."),
        (["passed", "passed in part", "skipped"], 0, "proved on this GPU: 1 passed, 1 passed in part, 1 skipped."),
        (["passed in part"], 0, "proved on this GPU: 1 passed in part."),
        (["passed", "failed", "skipped"], 1, "a section failed: 1 passed, 1 failed, 1 skipped."),
        (["walked", "failed"], 1, "a section failed: 1 walked, 1 failed."),
        (["skipped", "skipped"], 3, "nothing was proved: 2 skipped; "),
        (["walked", "skipped"], 3, "nothing was proved: 1 walked, 1 skipped, on a CPU; "),
    ],
)
def test_the_exit_code_is_0_only_where_something_was_proved(verdicts, code, sentence, parts):
    got, said = parts("report").outcome(verdicts)
    assert got == code
    assert said.startswith(sentence)


def test_a_gpu_without_tensorrt_or_a_second_one_skips_their_sections(parts, monkeypatch):
    report = parts("report")
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = torch.device("cuda")
    proof = report.Proof(gpu, interpret=False)
    with pytest.raises(report.Skipped):
        parts("tensorrt").prove(proof)
    assert [gap.split(" cannot be used here (")[0] for gap in proof.gaps] == ["tensorrt", "tensorrt-rtx"]
    with pytest.raises(report.Skipped, match="it takes two GPUs, and this machine has 1"):
        parts("ranks").prove(report.Proof(gpu, interpret=False))


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_a_card_that_tensorrt_rtx_does_not_know_is_a_gap(parts, monkeypatch):
    report = parts("report")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    proof = report.Proof(torch.device("cuda"), interpret=False)
    with pytest.raises(report.Skipped):
        parts("tensorrt").prove(proof)
    assert proof.gaps[-1] == "tensorrt-rtx builds nothing for compute capability 9.0"


@pytest.mark.parametrize(
    ("gaps", "failures", "nothing", "verdict"),
    [
        ([], [], False, "passed"),
        (["tensorrt cannot be used here"], [], False, "passed in part"),
        (["no time"], [], True, "skipped"),
        (["no time"], ["error 1"], True, "failed"),
    ],
)
def test_a_section_passes_where_it_ran_and_in_part_where_something_was_missing(gaps, failures, nothing, verdict, parts):
    report = parts("report")
    proof = report.Proof(torch.device("cuda"), interpret=False, gaps=gaps, failures=failures)
    assert report.verdict_of(proof, nothing) == verdict


def test_a_section_that_had_no_time_for_anything_is_skipped(parts):
    report = parts("report")
    proof = report.Proof(torch.device("cpu"), interpret=True, ends=0.0)
    with pytest.raises(report.Skipped):
        parts("kernel").prove(proof)
    assert proof.gaps == ["2 random calls for lack of time"]


def test_a_check_that_fails_fails_its_section(parts):
    proof = parts("report").Proof(torch.device("cuda"), interpret=False)
    proof.check("caches are not copied", None, "no inspector")
    proof.check("ranks agree", True)
    assert proof.failures == []
    proof.check("costs are replays'", False, "twice as long")
    assert [verdict for _, verdict, _ in proof.checks] == ["skipped", "passed", "failed"]
    assert proof.failures == ["costs are replays': twice as long"]


def test_qwen3s_heads_come_first_and_kernels_are_compiled_by_other_processes(parts):
    kernel, report = parts("kernel"), parts("report")
    rng = np.random.default_rng(0)
    first, second = itertools.islice(kernel.shapes(rng, False), 2)
    assert (first.past.tolist(), first.heads, first.head_dim) == ([32_000], 32, 128)
    assert second.counts.tolist() == [700, 300]
    proof = report.Proof(torch.device("cpu"), interpret=False, ends=time.monotonic() + 500)
    kernel.compile_ahead(proof, list(kernel.shapes(rng, True))[:2])
    (line,) = proof.lines
    assert re.fullmatch(r"2 kernels, compiled by \d processes in \d+ s\.\n", line)


@pytest.mark.parametrize(
    ("triton", "numpy", "refused"), [("3.6.0", "2.5.2", True), ("3.7.0", "2.5.2", False), ("3.6.0", "2.3.9", False)]
)
def test_an_interpreter_that_cannot_run_is_refused_before_anything_runs(triton, numpy, refused, monkeypatch):
    script = runpy.run_path(str(ROOT / "scripts" / "gpu_proof"))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
    monkeypatch.setitem(sys.modules, "numpy", SimpleNamespace(__version__=numpy))
    problem = script["unable_to_interpret"]()
    assert bool(problem) == refused
    if refused:
        assert "the interpreter of Triton 3.6.0 does not run with numpy 2.5.2; install triton 3.7 or later" in problem


@pytest.fixture
def keeps_paths(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")


def write_wheel(folder: Path, name: str, machine: str = "any") -> None:
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-{machine}.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "here = 1\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-{machine}\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_wheels_of_a_folder_are_there_for_one_run(tmp_path, keeps_paths):
    install = runpy.run_path(str(ROOT / "scripts" / "gpu_proof"))["install"]
    write_wheel(tmp_path / "wheels", "brought_along")
    assert install(tmp_path / "wheels", str(tmp_path / "target")) == ""
    assert importlib.import_module("brought_along").here == 1


def test_wheels_that_cannot_be_installed_are_refused(tmp_path, keeps_paths):
    install = runpy.run_path(str(ROOT / "scripts" / "gpu_proof"))["install"]
    (tmp_path / "none").mkdir()
    assert "which holds no .whl file" in install(tmp_path / "none", str(tmp_path / "target"))
    write_wheel(tmp_path / "wheels", "elsewhere", "win_arm64")
    problem = install(tmp_path / "wheels", str(tmp_path / "target"))
    assert "pip cannot install the wheels" in problem
    assert "not a supported wheel on this platform" in problem


def test_all_sections_end_within_eight_minutes(parts):
    report = parts("report")
    assert list(report.SECTIONS) == list(SECTIONS)
    assert sum(report.SECTIONS.values()) <= report.LAST < 480


def test_unknown_sections_are_refused(copy):
    done = run(copy, "--only", "kernel,sped")
    assert (done.returncode, done.stderr.strip()) == (
        2, "error: --only names 'sped'; choose from kernel, engine, serving, curves, speed, lossless, tensorrt, "
           "ranks.")  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(copy):
    done = run(copy)
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
