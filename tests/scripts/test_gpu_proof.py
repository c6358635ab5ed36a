"""scripts/gpu_proof on a CPU: the same code at tiny sizes, with no more installed than it says it needs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
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


def test_every_section_runs_and_is_told(copy):
    done = run(copy, "--cpu-interpret", "--out", "report.md")
    report = (copy / "report.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + report
    for section in ("kernel", "speed", "curves", "lossless", "tensorrt", "ranks"):
        assert f"| {section} | passed |" in report
        assert f"## {section}\n" in report
    assert "| float32 | echo | 2 of 2 |" in report
    assert "not installed (" in report


def test_a_failure_is_told_and_the_other_sections_go_on(copy):
    kernel = copy / "plugins/super_tree_attention/kernel.py"
    text = kernel.read_text()
    kernel.write_text(text.replace("1.4426950408889634 * HEAD_DIM**-0.5", "1.3 * HEAD_DIM**-0.5"))
    assert kernel.read_text() != text
    (copy / "scripts/gpu_proof_parts/speed.py").write_text(
        "def prove(proof):\n    raise OSError('the card is on fire')\n"
    )
    done = run(copy, "--cpu-interpret", "--only", "kernel,speed,tensorrt")
    report = (copy / "gpu_proof.md").read_text()
    assert done.returncode == 1
    assert "**FAILED**: error " in report
    assert "**FAILED**: OSError: the card is on fire" in report
    assert "| tensorrt | passed |" in report


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
