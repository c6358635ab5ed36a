"""Compares the CPU engine's kernels for ARM with their reference, bit for bit, on any machine.

    apt-get install qemu-user-static; pip install ziglang
    python scripts/proofs/arm_kernels.py

LLVM writes the machine code, zig links it to a program that calls it, QEMU runs that. Exit code 1 where bits differ.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from echo_trt.backends.cpu import kernels
from echo_trt.backends.cpu.formats import FORMATS, WeightFormat, Weights, pack, reference
from echo_trt.backends.cpu.machine_code import INSTRUCTION_SETS

TRIPLE, COLUMNS, OUT, COUNTS = "aarch64-linux-gnu", 512, 45, (1, 2, 3, 5, 8, 9, 16, 17, 40)
PROGRAM = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
typedef int64_t i;
void quantise(void *, i, i);
void product(void *, i, i);
int main(int count, char **files) { // rows, K, N, groups of factors, blocks, whether floats, plane, bytes of weights
  FILE *f = fopen(files[1], "rb");
  i h[9];
  fread(h, 8, 9, f);
  char *quants = aligned_alloc(64, h[7] + 64 - h[7] % 64), *scales = malloc(h[8] + 1);
  float *x = malloc(h[0] * h[1] * 4), *out = malloc(h[0] * h[2] * 4);
  fread(quants, 1, h[7], f), fread(scales, 1, h[8], f), fread(x, 4, h[0] * h[1], f);
  i groups = h[1] / 32, plane = (h[0] + 15) / 16 * groups * 64;
  char *values = malloc(plane * 8), *factors = malloc(plane), *planes = malloc(plane * 6);
  i first[] = {(i)h, (i)x, (i)values, (i)factors, (i)planes, h[1] * 4, groups, plane};
  i second[] = {(i)h, (i)quants, (i)scales, h[4], h[3], h[2], (i)(h[5] ? (char *)x : values), (i)factors,
                (i)(planes + h[6] * plane), h[5] ? h[1] * 4 : plane, (i)out, h[2] * 4, 0, 0, 2, 0};
  quantise(first, 0, 2), quantise(first, 1, 2), product(second, 1, 2);
  fwrite(out, 4, h[0] * h[2], fopen(files[2], "wb"));
  return 0;
}
"""


def random_weights(shape: WeightFormat, random: np.random.Generator) -> Weights:
    """Draw a matrix [OUT, COLUMNS] with integers and scales of the whole range."""

    def bytes_of(*size: int) -> np.ndarray:
        return random.integers(0, 256, size, np.uint8)

    def halves() -> np.ndarray:
        return random.uniform(-0.1, 0.1, (OUT, COLUMNS // shape.multiple)).astype(np.float16)

    if shape.kind:
        floats = random.standard_normal((OUT, COLUMNS)).astype(np.float32)
        bits = floats.astype(np.float16).view(np.uint16) if shape.kind == "f16" else floats.view(np.uint32) >> 16
        return Weights(shape, floats if shape.kind == "f32" else bits.astype(np.uint16))
    values, groups = bytes_of(OUT, COLUMNS) & (2**shape.bits - 1), COLUMNS // 32
    minimum = halves() if shape.minimum else None
    if not shape.integers:
        return Weights(shape, values.astype(np.uint8), halves(), minimum)
    scales = bytes_of(OUT, groups, shape.integers)
    scales = scales.view(np.int8) if shape.integers == 2 else scales % 64
    minimums = bytes_of(OUT, groups) % 64 if shape.minimum else None
    return Weights(shape, values.astype(np.uint8), halves(), minimum, scales, minimums)


def compile_to(file: Path, write: Callable[[ir.Module], None]) -> Path:
    """Compile the IR that ``write`` makes into an object file for ARM."""
    module = ir.Module()
    write(module)
    target = llvm.Target.from_triple(TRIPLE).create_target_machine(features="+neon,+dotprod", opt=3, reloc="pic")
    file.write_bytes(target.emit_object(llvm.parse_assembly(str(module))))
    return file


def same_bits(shape: WeightFormat, folder: Path) -> bool:
    """Run a format's kernel on all numbers of rows, and say whether it has the reference's bits."""
    random, using = np.random.default_rng(0), INSTRUCTION_SETS["dotprod"]
    objects = [
        compile_to(folder / "quantise.o", kernels.quantise),
        compile_to(folder / "product.o", lambda module: kernels.product(module, shape, using)),
    ]
    (folder / "main.c").write_text(PROGRAM)
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static", "-w", "-O1"]
    subprocess.run([*zig, folder / "main.c", *objects, "-o", folder / "main"], check=True)
    weights = random_weights(shape, random)
    packed = pack(weights, using.lanes)
    plane = 0 if shape.kind else kernels.SUMS if shape.minimum else kernels.PLANES[shape.offset]
    for rows in COUNTS:
        x = random.standard_normal((rows, COLUMNS)).astype(np.float32)
        blocks, steps = -(-OUT // using.lanes), COLUMNS // shape.multiple
        sizes = [packed.quants.nbytes, packed.scales.nbytes]
        head = np.array([rows, COLUMNS, OUT, steps, blocks, bool(shape.kind), plane, *sizes], np.int64)
        parts = (head, packed.quants, packed.scales, x)
        (folder / "in").write_bytes(b"".join(part.tobytes() for part in parts))
        subprocess.run(["qemu-aarch64-static", folder / "main", folder / "in", folder / "out"], check=True)
        out = np.fromfile(folder / "out", np.float32).reshape(rows, OUT)
        if not np.array_equal(out, reference(x, weights)):
            return False
    return True


def main() -> int:
    """Print a line for each format, and return the exit code."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    with tempfile.TemporaryDirectory() as folder:
        equal = {name: same_bits(shape, Path(folder)) for name, shape in FORMATS.items()}
    for name, same in equal.items():
        print(name, "equal" if same else "DIFFERS")
    return int(not all(equal.values()))


if __name__ == "__main__":
    sys.exit(main())
