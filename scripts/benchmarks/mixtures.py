"""Times passes of a mixture of experts: Qwen3-30B-A3B's layers with random weights, a table of ms by number of tokens.

    python scripts/benchmarks/mixtures.py write FOLDER --engine cpu --precision int4 --layers 4
    python scripts/benchmarks/mixtures.py run FOLDER

``write`` puts a network with a small vocabulary into the folder, ``run`` times all that are there. Tokens are random,
and so choose experts that have little in common: a text's tokens share more.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import cyclopts
import numpy as np
import torch

from echo_trt.backends.cpu.engine import CPUEngine
from echo_trt.models.checkpoint import Part
from echo_trt.models.roles import TargetModule
from echo_trt.models.weights import load_decoder
from echo_trt.sizing.shapes import published
from echo_trt.speculation.pack import BLOCK, pack
from echo_trt_lab.random_weights import RandomCheckpoint

ROWS, FIRST, BEFORE, VOCABULARY = (1, 2, 4, 8, 16, 32), 190, 64, 1024
app = cyclopts.App()


class Repeated(RandomCheckpoint):
    """Weights that are the same for all experts and layers, which takes less time to draw."""

    def get(self, name: str, part: Part = ()) -> torch.Tensor:
        shape = self.shape(name)
        return _drawn(shape)[part] if len(shape) > 1 else super().get(name, part)


@cache
def _drawn(shape: tuple[int, ...]) -> torch.Tensor:
    return (torch.randn(shape) * shape[-1] ** -0.5).to(torch.bfloat16)


@app.command
def write(folder: Path, *, engine: str, precision: str, layers: int = 4) -> None:
    """Write a network of an engine in a precision."""
    config = {**published()["Qwen/Qwen3-30B-A3B"], "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    role = TargetModule(load_decoder(Repeated(config, "mixture", lambda: None), 8 * BLOCK, None))
    folder.mkdir(exist_ok=True)
    file, begin = f"{engine}-{precision}-{layers}", time.perf_counter()
    if engine == "cpu":
        from echo_trt.backends.cpu.build import compile_role

        compile_role(role, folder / f"{file}.cpu", precision)
    else:
        from echo_trt.backends.openvino import build

        build.compile_role(role, folder / f"{file}.onnx", precision)
    print(f"{file}: written in {time.perf_counter() - begin:.0f} s")


@app.command
def run(folder: Path, *, passes: int = 9) -> None:
    """Print the median time of passes behind 64 tokens, divided by the number of layers."""
    print("| ms of a layer, by tokens |", " | ".join(map(str, ROWS)), "|")
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".cpu", ".onnx")):
        engine, precision, layers = path.stem.split("-")
        if engine == "cpu":
            network = CPUEngine(path, precision, 8)
        else:
            from echo_trt.backends.openvino.engine import OpenVINOEngine

            network = OpenVINOEngine(path, precision, 8)
        rng, times = np.random.default_rng(0), []
        for rows in (FIRST, *ROWS):  # the first reads all experts into memory
            measured = []
            for _ in range(1 if rows == FIRST else passes):
                ids, at = rng.integers(0, VOCABULARY, rows), np.array([BEFORE])
                call = pack(ids, BEFORE + np.arange(rows), at, np.array([rows]), np.arange(8)[None], np.arange(rows))
                begin = time.perf_counter()
                network.run(call)
                measured.append(time.perf_counter() - begin)
            times.append(f"{1000 * np.median(measured) / int(layers):.2f}")
        print(f"| {engine} {precision} |", " | ".join(times[1:]), "|", flush=True)


app()
