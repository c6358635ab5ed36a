"""Compilation of the kernels without a GPU: ``python -m super_tree_attention.ahead_of_time --arch 80,90 --out DIR``.

Launch arguments: ``CompiledKernel.arguments``, in order, then two null pointers, which Triton's compiler adds for
scratch memory that these kernels do not use. Grids: kernel_plan.plan for attention and combine, (rows moved, pools) for
copy_rows. A block has 32 * num_warps threads.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from super_tree_attention import kernel
from super_tree_attention.kernel_plan import MAX_SPLITS, STEPS, modest_steps, registers_of, rows_for, warps_of

ARCHITECTURES = (80, 89, 90, 100, 103, 110, 120, 121)
DTYPES = ("bf16", "fp16")
HEAD_DIMS = (64, 128)
MAX_GROUP = 16
TABLE_GROUPS = (1, 4, 5, 16)  # group sizes of the table: the least, Qwen3-8B's, Qwen3-14B's and the largest

_PTX_VERSION = 88  # newer drivers are needed for a larger one, from CUDA 12.9's on
_LEAST_PTX = {103: 88, 110: 90, 121: 88}  # a card's own, where it is not as old as the others; older ones abort
_FIXED_TYPES = {"partial": "*fp32", "partial_lse": "*fp32", "tree_mask": "*u8"} | dict.fromkeys(
    (
        "num_requests",
        "wanted_splits",
        "num_tokens",
        "num_blocks",
        "num_entries",
        "mask_bytes",
        "num_splits",
        "kv_heads",
    ),
    "i32",
)
_INT_POINTERS = ("past_lens", "seq_begins", "block_indices", "block_begins", "tree_mask_begins")


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel for one card.

    name       of the PTX's entry
    shared     bytes of dynamic shared memory
    registers  of a thread
    spills     bytes of a thread's stack
    arguments  (name, Triton's type, such as ``*bf16`` or ``i32``)
    """

    name: str
    architecture: int
    ptx: str
    cubin: bytes
    num_warps: int
    shared: int
    registers: int
    spills: int
    arguments: tuple[tuple[str, str], ...]

    @property
    def threads(self) -> int:
        return 32 * self.num_warps


def compile_kernels(
    compute_capability: int, dtype: str, head_dim: int, group: int, block: int = 32
) -> dict[str, CompiledKernel]:
    """Compile all kernels of a network. Raises ValueError for a value that is not supported.

    They are attention_16, attention_64 (and attention_128), by rows of a tile, combine, gather_rows and scatter_rows.
    dtype: bf16 or fp16; group: query heads of a KV head.
    """
    tiles = {
        f"attention_{rows}": compile_kernel("attention", compute_capability, dtype, head_dim, group, rows, block)
        for rows in rows_for(compute_capability)
    }
    others = ("combine", "gather_rows", "scatter_rows")
    return tiles | {kind: compile_kernel(kind, compute_capability, dtype, head_dim, block=block) for kind in others}


@cache
def compile_kernel(
    kind: str,
    compute_capability: int,
    dtype: str,
    head_dim: int,
    group: int = 1,
    rows: int = 16,
    block: int = 32,
    modest: bool = False,
) -> CompiledKernel:
    """Compile attention, combine, gather_rows or scatter_rows; ``group``, ``rows``, ``modest`` are attention's alone.

    ``modest``: with no more shared memory than a kernel gets without asking (kernel_plan.PLAIN_SHARED).
    """
    _check(compute_capability, dtype, head_dim, group)
    steps = modest_steps(rows, compute_capability) if modest else STEPS
    function = getattr(kernel, kind if hasattr(kernel, kind) else "copy_rows")
    constants = {
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "BLOCK": block,
        "ROWS": rows,
        "KEYS": steps.keys,
        "NEW_KEYS": steps.new_keys,
        "MAX_SPLITS": MAX_SPLITS,
        "GATHER": kind == "gather_rows",
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = _types(function.arg_names, dtype, constants)
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t in (f"*{dtype}", "*fp32")}
    tile = {"num_warps": 4}
    if kind == "attention":
        tile = {"num_warps": warps_of(rows), "maxnreg": registers_of(rows), "num_stages": steps.stages}
    made = triton.compile(
        ASTSource(function, types, constants, aligned),
        target=GPUTarget("cuda", compute_capability, 32),
        options={"ptx_version": ptx_version(compute_capability), "enable_fp_fusion": True, **tile},
    )
    registers, spills = _resources(made.asm["cubin"])
    return CompiledKernel(
        name=made.metadata.name,
        architecture=compute_capability,
        ptx=made.asm["ptx"],
        cubin=made.asm["cubin"],
        num_warps=made.metadata.num_warps,
        shared=made.metadata.shared,
        registers=registers,
        spills=spills,
        arguments=tuple((name, t) for name, t in types.items() if t != "constexpr"),
    )


def card_architecture(capability: str) -> int:
    """Return the architecture of a card's kernels, such as 90 for "9.0". Raises ValueError where there is none."""
    number = int(capability.replace(".", ""))
    number = 80 if number in (86, 87) else number  # they run kernels for 8.0
    if number not in ARCHITECTURES:
        known = ", ".join(f"{architecture / 10}" for architecture in ARCHITECTURES)
        raise ValueError(f"no attention kernel is compiled for it, only for {known}")
    return number


@cache
def ptx_version(compute_capability: int) -> int:
    """Return the version of PTX for a card, such as 88: no newer than Triton's assembler knows.

    Raises ValueError where the assembler is too old for the card.
    """
    known, minimum = assembler_version(compute_capability), _LEAST_PTX.get(compute_capability, 0)
    if known < minimum:
        raise ValueError(
            f"compute capability {compute_capability} needs PTX {minimum / 10}, and this Triton's ptxas knows "
            f"{known / 10}; install a newer triton, or set TRITON_PTXAS_PATH and "
            "TRITON_PTXAS_BLACKWELL_PATH to the ptxas of a newer CUDA"
        )
    return max(min(_PTX_VERSION, known), minimum)


def assembler_version(compute_capability: int) -> int:
    """Return the newest version of PTX that Triton's assembler for a card knows, such as 87 for CUDA 12.8's."""
    from triton.backends.nvidia.compiler import get_ptxas

    text = subprocess.run([_assembler(get_ptxas, compute_capability), "--version"], capture_output=True, text=True)
    major, minor = map(int, re.search(r"release (\d+)\.(\d+)", text.stdout).groups())
    # PTX 8.0 came with CUDA 12.0 and 9.0 with CUDA 13.0; CUDA 12.7 was not released, and 12.6 and 12.5 share 8.5.
    return 10 * (major - 4) + (minor if major > 12 or minor < 6 else minor - 1)


def _assembler(get_ptxas: Callable, compute_capability: int) -> str:
    try:
        return get_ptxas(compute_capability).path
    except TypeError:  # earlier releases have one assembler
        return get_ptxas().path


def _check(compute_capability: int, dtype: str, head_dim: int, group: int) -> None:
    for name, value, supported in (
        ("compute capability", compute_capability, ARCHITECTURES),
        ("dtype", dtype, DTYPES),
        ("head dimension", head_dim, HEAD_DIMS),
        ("group of query heads", group, range(1, MAX_GROUP + 1)),
    ):
        if value not in supported:
            raise ValueError(f"{name} {value} is not supported; choose one of {', '.join(map(str, supported))}")


def _types(names: list[str], dtype: str, constants: dict[str, int]) -> dict[str, str]:
    types = dict.fromkeys(names, f"*{dtype}") | _FIXED_TYPES | dict.fromkeys(_INT_POINTERS, "*i32")
    types |= dict.fromkeys(("source_rows", "target_rows"), "*i64") | dict.fromkeys(constants, "constexpr")
    return {name: types[name] for name in names}


def _resources(cubin: bytes) -> tuple[int, int]:
    """Read a thread's registers and bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def _table(architectures: list[int], groups: tuple[int, ...]) -> Iterator[tuple[str, str, int, int, CompiledKernel]]:
    """Yield (kernel, dtype, head_dim, group, compiled); kernels that do not depend on the group come once."""
    for architecture in architectures:
        for dtype in DTYPES:
            for head_dim in HEAD_DIMS:
                for group in groups:
                    for kind, compiled in compile_kernels(architecture, dtype, head_dim, group).items():
                        if kind.startswith("attention") or group == groups[0]:
                            yield kind, dtype, head_dim, group, compiled


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="super_tree_attention.ahead_of_time", description=__doc__.splitlines()[0])
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--arch", type=numbers, default=list(ARCHITECTURES), help="compute capabilities, such as 80,90")
    parser.add_argument("--groups", type=numbers, default=list(TABLE_GROUPS), help="query heads of a KV head")
    parser.add_argument("--out", type=Path, help="folder for PTX and cubin files")
    chosen = parser.parse_args(arguments)
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
    print("| kernel | sm | dtype | head dim | group | registers | shared, bytes | spilled, bytes |")
    print("|---|---|---|---|---|---|---|---|")
    try:
        for kind, dtype, head_dim, group, made in _table(chosen.arch, tuple(chosen.groups)):
            cells = kind, made.architecture, dtype, head_dim, group, made.registers, made.shared, made.spills
            print("|", " | ".join(map(str, cells)), "|", flush=True)
            if chosen.out:
                stem = chosen.out / f"{kind}_sm{made.architecture}_{dtype}_d{head_dim}_g{group}"
                stem.with_suffix(".ptx").write_text(made.ptx)
                stem.with_suffix(".cubin").write_bytes(made.cubin)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
