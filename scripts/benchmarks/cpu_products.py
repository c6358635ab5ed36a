"""Times passes by the number of their tokens: of bundles, and of matrix products alone; and the memory's read rate.

    python scripts/benchmarks/cpu_products.py passes BUNDLE... --tokens 1,2,4,8,16,32,512 --cores 1,2
    python scripts/benchmarks/cpu_products.py products --formats q4_k,q8_0 --sets amx,avx512_vnni,avx2 --threads 1,2

``passes`` runs each bundle's target in a process of its own, behind a text of ``--context`` tokens of one request.
``products`` takes Qwen2.5-1.5B's shapes and arbitrary weights; a row ends with the rate at which one row's pass reads.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cyclopts
import numpy as np

from echo_trt.backends.cpu.formats import FORMATS, GROUP, PackedWeights
from echo_trt.backends.cpu.machine_code import INSTRUCTION_SETS, InstructionSet, instruction_set
from echo_trt.backends.cpu.products import Product, products
from echo_trt.backends.cpu.program import Op, Pool, Program, aligned
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.kind import engine_kind
from echo_trt.bundle.manifest import read_manifest
from echo_trt.speculation.pack import BLOCK, pack

HIDDEN, WIDE, QUERIES, VOCABULARY, LAYERS = 1536, 8960, 2048, 151936, 28
FEW = 64  # tokens of a pass whose logits are all asked for; a longer one is a prompt

app = cyclopts.App(help=__doc__)


def median(run: Callable[[], object], passes: int) -> float:
    """Return the median time of a pass in ms; one more comes before them."""
    times = []
    for _ in range(passes + 1):
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return float(np.median(times[1:]))


def line(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


@app.command
def passes(*bundles: Path, tokens: str = "1,2,4,8,16,32,512", cores: str = "1,2", context: int = 64, count: int = 9):
    """Print the median time of target passes.

    Parameters
    ----------
    tokens, cores
        of a pass, and of the machine; divided by commas.
    context
        tokens that the request has before.
    count
        how many passes are timed.
    """
    line("bundle", "engine", "precision", "cores", *tokens.split(","))
    line(*["---"] * (4 + len(tokens.split(","))))
    for bundle in bundles:
        for each in cores.split(","):
            chosen = ",".join(map(str, sorted(os.sched_getaffinity(0))[: int(each)]))
            args = ["timed", str(bundle), "--tokens", tokens, "--context", str(context), "--count", str(count)]
            subprocess.run(["taskset", "-c", chosen, sys.executable, __file__, *args], check=True)
    for each in cores.split(","):
        print(f"memory reads {read_rate(int(each)):.0f} GB/s with {each} cores")


@app.command(show=False)
def timed(bundle: Path, *, tokens: str, context: int, count: int) -> None:
    """Print a bundle's row of ``passes``, on the cores that this process may use."""
    manifest, sizes = read_manifest(bundle), [int(each) for each in tokens.split(",")]
    blocks = -(-(context + max(sizes)) // BLOCK)
    kind, bounds = engine_kind(manifest.engine), CallBounds(1, blocks)
    engine = kind.open(bundle / manifest.target.file, manifest.precision, blocks, bounds, manifest.engine_facts)
    table, past, medians = np.arange(blocks)[None], np.array([context]), []
    for size in sizes:
        rows = np.arange(size)
        call = pack(rows + 100, context + rows, past, np.array([size]), table, rows if size <= FEW else rows[-1:])
        medians.append(f"{median(lambda call=call: engine.run(call), count if size <= FEW else 3):.1f}")
    line(bundle.name, manifest.engine, manifest.precision, len(os.sched_getaffinity(0)), *medians)


def read_rate(threads: int) -> float:
    """Return the rate in GB/s at which so many threads read 1 GB together."""
    parts = np.array_split(np.ones(1 << 27, np.uint64), threads)

    def run() -> None:
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return (1 << 30) / median(run, 5) / 1e6


def network(name: str, using: InstructionSet, rows: np.ndarray, longest: int) -> tuple[list[Op], int]:
    """Return the products of a pass, and the bytes of their weights."""
    size, shape, lanes = 0, FORMATS[name], using.lanes
    inputs = {width: np.random.default_rng(0).standard_normal((longest, width), np.float32) for width in (HIDDEN, WIDE)}

    def product(columns: int, out: int) -> Product:
        nonlocal size
        quants = aligned(out * columns // GROUP * shape.quant_bytes(1) + 4096)
        scales = aligned(out * columns // shape.multiple * shape.scale_bytes(1))
        quants[:], scales[:] = 17, 17
        size += quants.nbytes + scales.nbytes
        return Product(PackedWeights(shape, out, columns, lanes, quants, scales), np.empty((longest, out), np.float32))

    ops: list[Op] = []
    for _ in range(LAYERS):
        for wanted in ([(HIDDEN, QUERIES)], [(HIDDEN, HIDDEN)], [(HIDDEN, WIDE)] * 2, [(WIDE, HIDDEN)]):
            ops += products(inputs[wanted[0][0]], rows, [product(*each) for each in wanted], using)
    return ops + products(inputs[HIDDEN], rows, [product(HIDDEN, VOCABULARY)], using), size


@app.command(name="products")
def products_alone(
    *,
    formats: str = "q4_k",
    sets: str = instruction_set().name,
    threads: str = "1,2",
    tokens: str = "1,2,4,8,16,32",
    count: int = 7,
) -> None:
    """Print the median time of all products of a pass.

    Parameters
    ----------
    formats, sets, threads, tokens
        what to time, divided by commas.
    count
        how many passes are timed.
    """
    sizes = [int(each) for each in tokens.split(",")]
    line("format", "set", "threads", "GB", *sizes, "GB/s")
    for name in formats.split(","):
        for using in (INSTRUCTION_SETS[each] for each in sets.split(",")):
            rows = np.ones(1, np.int64)
            ops, size = network(name, using, rows, max(sizes))
            program = Program(ops)
            for pool in (Pool(int(each)) for each in threads.split(",")):
                medians = []
                for rows[0] in sizes:
                    medians.append(median(lambda pool=pool, program=program: pool.run(program), count))
                shown = (f"{each:.1f}" for each in medians)
                line(name, using.name, pool.threads, f"{size / 1e9:.2f}", *shown, f"{size / medians[0] / 1e6:.0f}")
                pool.close()


if __name__ == "__main__":
    app()
