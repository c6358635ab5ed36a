"""Compilation of all Triton kernels without a GPU: ``python -m echo_trt_lab.kernels.compiled --arch 80,90 --out DIR``.

It prints registers, shared memory and spills. A new kernel is one more entry of ``sources``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from echo_trt.models import fp8_kernel
from super_tree_attention import kernel, layer_kernels, sampling_kernels
from super_tree_attention.kernel_plan import (
    MAX_SPLITS,
    ROUNDING,
    ROWS,
    SAMPLING,
    largest_tile,
    registers_of,
    steps_for,
    warps_of,
)

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
FP8_FROM = 89  # the first with products in FP8
DTYPES = ("bf16", "fp16")
HEAD_DIMS = (16, 32, 64, 128, 256)
WINDOW = 4096  # of layers with a window; another one compiles the same code
TABLE_GROUPS = (1, 4, 5, 16)  # query heads of a KV head: the least, Qwen3-8B's, Qwen3-14B's and the largest

#: Types of parameters; others point to values of the network's type.
_TYPES = (
    dict.fromkeys(("partial", "partial_lse"), "*fp32")
    | dict.fromkeys(("past_lens", "seq_begins", "block_indices", "block_begins", "tree_mask_begins"), "*i32")
    | dict.fromkeys(("source_rows", "target_rows"), "*i64")
    | dict.fromkeys(("num_requests", "wanted_splits", "num_tokens", "num_blocks", "num_entries"), "i32")
    | dict.fromkeys(("mask_bytes", "num_splits", "kv_heads"), "i32")
    | {"tree_mask": "*u8"}
)
_SAMPLED = (
    dict.fromkeys(("row", "index", "parent", "drafted", "top_k", "seed", "position", "tokens"), "*i64")
    | {"masks": "*u8", "inverse": "*fp64", "heat": "*fp32", "gap": "*fp32", "top_p": "*fp64"}
    | dict.fromkeys(("size", "mask_size"), "i32")
)
_ALIGNED = ("*fp32", "*fp8e4nv")  # pointers whose memory begins at a multiple of 16 bytes, as the network's do
_PENALISED = (
    dict.fromkeys(("rows", "row", "token"), "*i64")
    | dict.fromkeys(("repetition", "presence", "frequency"), "*fp64")
    | {"out": "*fp32", "times": "*i32", "count": "i32", "size": "i32"}
)
_ADDED = dict.fromkeys(("row", "token"), "*i64") | dict.fromkeys(("count", "size"), "i32")
_QUANTISED = {"rows": "*fp8e4nv", "scales": "*fp32", "width": "i32"}
_MULTIPLIED = (
    dict.fromkeys(("x", "weight"), "*fp8e4nv")
    | dict.fromkeys(("x_scales", "scales"), "*fp32")
    | dict.fromkeys(("n", "outputs", "inputs"), "i32")
)
_LAYER = dict.fromkeys(("size", "heads", "kv_heads"), "i32") | {"eps": "fp32", "cos": "*fp32", "sin": "*fp32"}


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel for one card.

    shared     bytes of dynamic shared memory
    registers  of a thread
    spills     bytes of a thread's stack
    """

    name: str
    architecture: int
    ptx: str
    cubin: bytes
    threads: int
    shared: int
    registers: int
    spills: int


class KernelSource(NamedTuple):
    """A kernel before it is compiled; ``types`` of parameters that _TYPES does not know are the network's."""

    function: Any
    constants: dict[str, Any]
    options: dict[str, int]
    types: dict[str, str]


@cache
def compiled(name: str, architecture: int, dtype: str, head_dim: int, group: int = 1) -> CompiledKernel:
    """Compile a kernel, such as attention_16, as the engines' launches do."""
    source = sources(dtype, head_dim, group, architecture)[name]
    types = dict.fromkeys(source.function.arg_names, f"*{dtype}") | _TYPES | source.types
    types = {n: "constexpr" if n in source.constants else types[n] for n in source.function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t in (f"*{dtype}", *_ALIGNED)}
    made = triton.compile(
        ASTSource(source.function, types, source.constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options=source.options | ROUNDING,
    )
    registers, spills = _resources(made.asm["cubin"])
    facts = made.metadata
    threads = 32 * facts.num_warps
    asm = made.asm["ptx"], made.asm["cubin"]
    return CompiledKernel(facts.name, architecture, *asm, threads, facts.shared, registers, spills)


def sources(dtype: str, head_dim: int, group: int, architecture: int) -> dict[str, KernelSource]:
    sizes, made = {"HEAD_DIM": head_dim, "BLOCK": 32}, {}
    for end, window in (("", {"WINDOW": 0}), ("_window", {"WINDOW": WINDOW})):
        for rows in (rows for rows in ROWS if rows <= largest_tile(head_dim)):
            steps = steps_for(rows, architecture, 4 if dtype == "fp32" else 2, head_dim)
            constants = sizes | {"GROUP": group, "ROWS": rows, "KEYS": steps.keys, "NEW_KEYS": steps.new_keys} | window
            options = {"num_warps": warps_of(rows), "maxnreg": registers_of(rows), "num_stages": steps.stages}
            made[f"attention_{rows}{end}"] = KernelSource(kernel.attention, constants, options, {})
        made[f"combine{end}"] = KernelSource(kernel.combine, sizes | window | {"MAX_SPLITS": MAX_SPLITS}, {}, {})
    for name in ("gather_rows", "scatter_rows"):
        made[name] = KernelSource(kernel.copy_rows, sizes | {"GATHER": name == "gather_rows"}, {}, {})
    for name, masked in (("sample", False), ("sample_masked", True)):
        constants = {"MASKED": masked, "LANES": 512}
        made[name] = KernelSource(sampling_kernels.sample, constants, SAMPLING, _SAMPLED)
    made["penalise"] = KernelSource(sampling_kernels.penalise, {"BLOCK": 1024}, {}, _PENALISED)
    for name, kind in (("add_counts", "*i32"), ("add_biases", "*fp32")):
        types = _ADDED | {"target": kind, "amount": kind}
        made[name] = KernelSource(sampling_kernels.add_at, {"BLOCK": 1024}, {}, types)
    made["add_norm"] = KernelSource(layer_kernels.add_norm_kernel, {"BLOCK": 4096}, {"num_warps": 8}, _LAYER)
    made["silu_mul"] = KernelSource(layer_kernels.silu_mul_kernel, {"BLOCK": 1024}, {}, _LAYER)
    constants = {"DIM": head_dim, "NORM": True}
    made["rotated"] = KernelSource(layer_kernels.rotated_kernel, constants, {"num_warps": 1}, _LAYER)
    if architecture >= FP8_FROM and dtype == "bf16":
        for name, width in (("quantise", 1024), ("quantise_block", 128)):
            made[name] = KernelSource(fp8_kernel.quantise, {"WIDTH": width}, {}, _QUANTISED)
        for tokens, (rows, warps, stages) in fp8_kernel.TILES.items():
            constants = {"TOKENS": tokens, "OUTPUTS": rows, "ROWS": 128, "COLUMNS": 128}  # blocks of Qwen's
            options = {"num_warps": warps, "num_stages": stages}
            made[f"multiply_{tokens}"] = KernelSource(fp8_kernel.multiply, constants, options, _MULTIPLIED)
    return made


def _resources(cubin: bytes) -> tuple[int, int]:
    """Read a thread's registers and bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def _table(
    architectures: list[int], head_dims: list[int], groups: list[int]
) -> Iterator[tuple[str, str, int, int, CompiledKernel]]:
    """Yield (kernel, dtype, head_dim, group, compiled); kernels that do not depend on the group come once."""
    for architecture in architectures:
        for dtype in DTYPES:
            for head_dim in head_dims:
                for group in groups:
                    for name in sources(dtype, head_dim, group, architecture):
                        if name.startswith("attention") or group == groups[0]:
                            yield name, dtype, head_dim, group, compiled(name, architecture, dtype, head_dim, group)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="echo_trt_lab.kernels.compiled", description=__doc__.splitlines()[0])
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--arch", type=numbers, default=list(ARCHITECTURES), help="compute capabilities, such as 80,90")
    parser.add_argument("--head-dims", type=numbers, default=list(HEAD_DIMS), help="sizes of heads")
    parser.add_argument("--groups", type=numbers, default=list(TABLE_GROUPS), help="query heads of a KV head")
    parser.add_argument("--out", type=Path, help="folder for PTX and cubin files")
    chosen = parser.parse_args(arguments)
    if unknown := [number for number in chosen.arch if number not in ARCHITECTURES]:
        parser.error(f"--arch names {unknown[0]}; choose from {', '.join(map(str, ARCHITECTURES))}")
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
    print("| kernel | sm | dtype | head dim | group | registers | shared, bytes | spilled, bytes |")
    print("|---|---|---|---|---|---|---|---|")
    for name, dtype, head_dim, group, made in _table(chosen.arch, chosen.head_dims, chosen.groups):
        cells = name, made.architecture, dtype, head_dim, group, made.registers, made.shared, made.spills
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        if chosen.out:
            stem = chosen.out / f"{name}_sm{made.architecture}_{dtype}_d{head_dim}_g{group}"
            stem.with_suffix(".ptx").write_text(made.ptx)
            stem.with_suffix(".cubin").write_bytes(made.cubin)


if __name__ == "__main__":
    main()
