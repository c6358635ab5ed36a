"""Times all matrix products of a pass through Qwen2.5-1.5B's shapes by the CPU engine's kernels, ms by number of rows.

    python scripts/benchmarks/cpu_products.py --formats q4_k,q8_0 --sets avx512_vnni,avx2 --threads 1,2

Weights are arbitrary. A row of the table ends with the rate at which one row's pass reads them.
"""

from __future__ import annotations

import time

import cyclopts
import numpy as np

from echo_trt.backends.cpu.formats import FORMATS, GROUP, PackedWeights
from echo_trt.backends.cpu.machine_code import INSTRUCTION_SETS, InstructionSet, instruction_set
from echo_trt.backends.cpu.products import Product, products
from echo_trt.backends.cpu.program import Op, Pool, Program, aligned

HIDDEN, WIDE, QUERIES, VOCABULARY, LAYERS = 1536, 8960, 2048, 151936, 28
ROWS = (1, 2, 4, 8, 16, 32)


def network(name: str, using: InstructionSet, rows: np.ndarray) -> tuple[list[Op], int]:
    """Return the products of a pass, and the bytes of their weights."""
    size, shape, lanes = 0, FORMATS[name], using.lanes
    inputs = {
        width: np.random.default_rng(0).standard_normal((ROWS[-1], width), np.float32) for width in (HIDDEN, WIDE)
    }

    def product(columns: int, out: int) -> Product:
        nonlocal size
        quants = aligned(out * columns // GROUP * shape.quant_bytes(1) + 4096)
        scales = aligned(out * columns // shape.multiple * shape.scale_bytes(1))
        quants[:], scales[:] = 17, 17
        size += quants.nbytes + scales.nbytes
        return Product(PackedWeights(shape, out, columns, lanes, quants, scales), np.empty((ROWS[-1], out), np.float32))

    ops: list[Op] = []
    for _ in range(LAYERS):
        for wanted in ([(HIDDEN, QUERIES)], [(HIDDEN, HIDDEN)], [(HIDDEN, WIDE)] * 2, [(WIDE, HIDDEN)]):
            ops += products(inputs[wanted[0][0]], rows, [product(*each) for each in wanted], using)
    return ops + products(inputs[HIDDEN], rows, [product(HIDDEN, VOCABULARY)], using), size


def main(*, formats: str = "q4_k", sets: str = instruction_set().name, threads: str = "1,2", passes: int = 7) -> None:
    """Print the median time of passes.

    Parameters
    ----------
    formats, sets, threads
        what to time, divided by commas.
    passes
        how many are timed.
    """
    print("| format | set | threads | GB |", " | ".join(map(str, ROWS)), "| GB/s |")
    for name in formats.split(","):
        for using in (INSTRUCTION_SETS[each] for each in sets.split(",")):
            rows = np.ones(1, np.int64)
            ops, size = network(name, using, rows)
            program = Program(ops)
            for pool in (Pool(int(each)) for each in threads.split(",")):
                medians = []
                for rows[0] in ROWS:
                    times = []
                    for _ in range(passes + 1):
                        begin = time.perf_counter()
                        pool.run(program)
                        times.append(1e3 * (time.perf_counter() - begin))
                    medians.append(float(np.median(times[1:])))
                cells = [name, using.name, pool.threads, f"{size / 1e9:.2f}", *(f"{each:.1f}" for each in medians)]
                print("|", " | ".join(map(str, [*cells, f"{size / medians[0] / 1e6:.0f}"])), "|", flush=True)
                pool.close()


if __name__ == "__main__":
    cyclopts.run(main)
