"""The report: sections in turn, each guarded, so that a failure of one is told and the others go on."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import math
import platform
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

#: section -> seconds after which it starts nothing new on a card. The most telling sections come first.
SECTIONS = {
    "kernel": 80.0,
    "engine": 40.0,
    "serving": 110.0,
    "curves": 50.0,
    "speed": 40.0,
    "lossless": 45.0,
    "tensorrt": 60.0,
    "ranks": 20.0,
}
LAST = 455.0  # seconds after which no section starts anything new: what was started then ends within 8 minutes
PROVED, FAILED, REFUSED, NOTHING_PROVED = 0, 1, 2, 3  # exit codes


class Failed(Exception):
    """Something is not as it must be; the sentence goes into the report."""


class Skipped(Exception):
    """Nothing of a section can be proved here; the reason goes into the report."""


@dataclass
class Proof:
    """What a section works with, and the lines that it adds."""

    device: torch.device
    interpret: bool
    ends: float = 0.0
    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    checks: list[tuple[str, str, str]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

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

    def check(self, name: str, holds: bool | None, detail: str = "") -> None:
        """Note a named check: it passed, failed (and the section with it), or could not be made: ``holds`` is None."""
        right = "walked" if self.interpret else "passed"
        self.checks.append((name, {True: right, False: "failed", None: "skipped"}[holds], detail))
        self.expect(holds is not False, f"{name}: {detail}")

    def record(self, **figures: Any) -> None:
        """Keep figures for the JSON, by name."""
        self.data.update(figures)

    def lacks(self, reason: str) -> None:
        """Note that a part of the section cannot be proved here, and go on."""
        self.gaps.append(reason)

    @property
    def in_time(self) -> bool:
        return time.monotonic() < self.ends


def run(out: Path, chosen: Sequence[str], interpret: bool) -> int:
    """Write the report and print the verdicts; the exit code that they come to."""
    proof = Proof(torch.device("cpu" if interpret else "cuda"), interpret)
    began, summary, sections = time.monotonic(), [], {}
    for name in (name for name in SECTIONS if name in chosen):
        start = time.monotonic()
        proof.ends = math.inf if interpret else min(start + SECTIONS[name], began + LAST)
        proof.failures, proof.gaps, proof.checks, proof.data = [], [], [], {}
        proof.lines.append(f"## {name}\n")
        nothing = False
        try:
            importlib.import_module(f"gpu_proof_parts.{name}").prove(proof)
        except Skipped as skipped:
            nothing = True
            proof.gaps += skipped.args
        except Exception as error:
            proof.failures.append(f"{type(error).__name__}: {error}")
            proof.lines.append("```\n" + traceback.format_exc().strip() + "\n```\n")
        if proof.checks:
            proof.table(("check", "verdict", ""), proof.checks)
        for sentence in proof.failures:
            proof.say(f"**FAILED**: {sentence}")
        reasons = "; ".join(proof.gaps)
        if reasons:
            proof.say(f"**SKIPPED**: {reasons}")
        verdict = verdict_of(proof, nothing)
        seconds = time.monotonic() - start
        summary.append((name, verdict, reasons, f"{seconds:.0f} s"))
        print(f"{name}: {verdict} in {seconds:.1f} s" + f" (skipped: {reasons})" * bool(reasons), flush=True)
        sections[name] = {
            "verdict": verdict,
            "seconds": round(seconds, 1),
            "skipped": proof.gaps,
            "failures": proof.failures,
            "checks": [dict(zip(("name", "verdict", "detail"), check, strict=True)) for check in proof.checks],
            "figures": proof.data,
        }
        _write_json(out.with_suffix(".json"), proof, sections)
        _write(out, proof, summary, began)  # after every section: a crash of the driver takes the process along
        gc.collect()  # an engine and its graphs hold each other
        if proof.device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"report: {out}, {out.with_suffix('.json')}")
    code, conclusion = outcome([verdict for _, verdict, *_ in summary])
    print(conclusion)
    return code


def verdict_of(proof: Proof, nothing: bool) -> str:
    """Say what came of a section. Where ``nothing`` of it ran it is skipped; on a CPU it is walked and cannot pass."""
    if proof.failures:
        return "failed"
    if nothing:
        return "skipped"
    return ("walked" if proof.interpret else "passed") + " in part" * bool(proof.gaps)


def outcome(verdicts: Sequence[str]) -> tuple[int, str]:
    """Say the exit code and the last sentence: any failure counts, and 0 takes a section that passed on a GPU."""
    told = ", ".join(f"{number} {verdict}" for verdict, number in Counter(verdicts).items())
    begins = {verdict.split()[0] for verdict in verdicts}
    if "failed" in begins:
        return FAILED, f"a section failed: {told}."
    if "passed" in begins:
        return PROVED, f"proved on this GPU: {told}."
    if "walked" in begins:
        return NOTHING_PROVED, f"nothing was proved: {told}, on a CPU; run it on a machine with an NVIDIA GPU."
    return NOTHING_PROVED, f"nothing was proved: {told}; install or add what the reasons name, and run it again."


def _write_json(out: Path, proof: Proof, sections: dict[str, Any]) -> None:
    content = {"card": card(proof.device), "machine": dict(facts(proof.device)), "interpreted": proof.interpret}
    out.write_text(json.dumps(content | {"sections": sections}, indent=1, default=float) + "\n", encoding="utf-8")


def _write(out: Path, proof: Proof, summary: list[tuple[str, str, str, str]], began: float) -> None:
    whole = Proof(proof.device, proof.interpret)
    whole.lines.append(f"# GPU proof: {card(proof.device)}\n")
    whole.table(("", ""), facts(proof.device))
    if proof.interpret:
        whole.say("Run with --cpu-interpret: the code was walked at tiny sizes. That proves nothing.")
    whole.table(
        ("section", "verdict", "skipped", "time"), [*summary, ("all", "", "", f"{time.monotonic() - began:.0f} s")]
    )
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
