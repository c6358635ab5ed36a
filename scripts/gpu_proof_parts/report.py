"""The report: sections in turn, each guarded, so that a failure of one is told and the others go on."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import platform
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

#: section -> seconds after which it starts nothing new on a card; together under 8 minutes
SECTIONS = {"kernel": 110.0, "speed": 60.0, "curves": 150.0, "lossless": 60.0, "tensorrt": 80.0, "ranks": 20.0}


class Failed(Exception):
    """Something is not as it must be; the sentence goes into the report."""


@dataclass
class Proof:
    """What a section works with, and the lines that it adds."""

    device: torch.device
    interpret: bool
    ends: float = 0.0
    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.lines.append(text + "\n")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        marks = [":--" if i == 0 else "--:" for i in range(len(head))]
        cells = [head, marks, *rows]
        self.lines.append("\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells) + "\n")

    def expect(self, holds: bool, sentence: str) -> None:
        """Note a failure, and go on."""
        if not holds:
            self.failures.append(sentence)

    @property
    def in_time(self) -> bool:
        return time.monotonic() < self.ends


def run(out: Path, chosen: Sequence[str], interpret: bool) -> int:
    """Write the report; 1 if a section failed, else 0."""
    proof = Proof(torch.device("cpu" if interpret else "cuda"), interpret)
    began, failed = time.monotonic(), []
    summary = []
    for name in (name for name in SECTIONS if name in chosen):
        start = time.monotonic()
        proof.ends, proof.failures = math.inf if interpret else start + SECTIONS[name], []
        proof.lines.append(f"## {name}\n")
        try:
            importlib.import_module(f"gpu_proof_parts.{name}").prove(proof)
        except Exception as error:
            proof.failures.append(f"{type(error).__name__}: {error}")
            proof.lines.append("```\n" + traceback.format_exc().strip() + "\n```\n")
        for sentence in proof.failures:
            proof.say(f"**FAILED**: {sentence}")
        verdict = "failed" if proof.failures else "passed"
        failed += [name] * bool(proof.failures)
        summary.append((name, verdict, f"{time.monotonic() - start:.0f} s"))
        print(f"{name}: {verdict} in {time.monotonic() - start:.1f} s", flush=True)
        _write(out, proof, summary, began)  # after every section: a crash of the driver takes the process along
        if proof.device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"report: {out}")
    return 1 if failed else 0


def _write(out: Path, proof: Proof, summary: list[tuple[str, str, str]], began: float) -> None:
    whole = Proof(proof.device, proof.interpret)
    whole.lines.append(f"# GPU proof: {card(proof.device)}\n")
    whole.table(("", ""), facts(proof.device))
    if proof.interpret:
        whole.say("Run with --cpu-interpret: the code was walked at tiny sizes; its times say nothing.")
    whole.table(("section", "verdict", "time"), [*summary, ("all", "", f"{time.monotonic() - began:.0f} s")])
    out.write_text("\n".join(whole.lines + proof.lines), encoding="utf-8")


def card(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "none, Triton's interpreter on a CPU"


def facts(device: torch.device) -> list[tuple[str, str]]:
    rows = [("Python", platform.python_version())]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        rows += [
            ("compute capability", f"{properties.major}.{properties.minor}"),
            ("multiprocessors", str(properties.multi_processor_count)),
            ("memory", f"{properties.total_memory / 2**30:.1f} GiB"),
            ("CUDA of PyTorch", str(torch.version.cuda)),
        ]
    return rows + [(name, version_of(name)) for name in ("torch", "triton", "tensorrt", "tensorrt_rtx", "cuda-python")]


def version_of(package: str) -> str:
    for name in (package, f"{package}-cu13", f"{package}-cu12"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"
