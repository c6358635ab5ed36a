"""scripts/gpu_proof on a CPU: the same code at tiny sizes, with no more installed than it says it needs."""

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
SECTIONS = ("kernel", "speed", "curves", "lossless", "tensorrt", "ranks")
#: What echo-trt may use elsewhere, and a bare GPU machine may lack.
MISSING = ("openvino", "nncf", "transformers", "tokenizers", "safetensors", "onnx", "onnxscript", "gguf", "scipy",
           "matplotlib", "typer", "rich", "jinja2", "tensorrt", "tensorrt_rtx")  # fmt: skip


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
        "nothing was proved: 5 walked, 1 skipped, on a CPU; run it on a machine with an NVIDIA GPU."
    )
    for section in SECTIONS:
        assert f"| {section} | {'skipped' if section == 'tensorrt' else 'walked'} |" in report
        assert f"## {section}\n" in report
    assert "passed" not in report
    assert "| float32 | echo | 2 of 2 |" in report
    assert "**SKIPPED**: tensorrt cannot be used here (" in report


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


def test_unknown_sections_are_refused(copy):
    done = run(copy, "--only", "kernel,sped")
    assert (done.returncode, done.stderr.strip()) == (
        2, "error: --only names 'sped'; choose from kernel, speed, curves, lossless, tensorrt, ranks.")  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(copy):
    done = run(copy)
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
