"""Compile LLVM IR to machine code of the CPU at hand, by the LLVM that numba brings: no compiler is installed."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm

from echo_trt.bundle.sources import cache_folder


@cache
def host_features() -> frozenset[str]:
    """Return the features of this CPU that LLVM knows, for example ``avx512vnni``."""
    found = {name for name, present in llvm.get_host_cpu_features().items() if present}
    return frozenset(found if _has_tiles(found) else found - {"amx-tile"})


def _has_tiles(features: set[str]) -> bool:
    """Ask Linux for the registers of AMX, which a process has to ask for once."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or "amx-tile" not in features:
        return False
    return bool(ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0)  # arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)


@dataclass(frozen=True)
class InstructionSet:
    """Name what a CPU has for products of 8-bit integers.

    lanes     int32 of a vector, columns of a block
    dot       LLVM's intrinsic that adds four products to an int32; "": made of multiplications of pairs, without
              saturation
    cpu       LLVM's name of a CPU that has no more; None: the one at hand
    needs     features that it needs
    signed    whether the intrinsic takes weights with a sign, as bytes
    bf16      how bf16 is multiplied: "" as float32, "pairs" by vdpbf16ps, "tiles" by AMX, which then multiplies
              integers of many rows, too
    """

    name: str
    lanes: int
    dot: str
    cpu: str | None
    needs: tuple[str, ...]
    signed: bool = False
    bf16: str = ""


_VNNI = "llvm.x86.avx512.vpdpbusd.512"
_AVX512 = "avx512vnni", "avx512bw", "f16c"
INSTRUCTION_SETS = {
    each.name: each
    for each in (
        InstructionSet("amx", 16, _VNNI, None, ("amx-tile", "amx-int8", "amx-bf16", *_AVX512), bf16="tiles"),
        InstructionSet("avx512_bf16", 16, _VNNI, None, ("avx512bf16", *_AVX512), bf16="pairs"),
        InstructionSet("avx512_vnni", 16, _VNNI, None, _AVX512),
        InstructionSet("avx_vnni", 8, "llvm.x86.avx512.vpdpbusd.256", "x86-64-v3", ("avxvnni", "fma", "f16c")),
        InstructionSet("avx2", 8, "", "x86-64-v3", ("avx2", "fma", "f16c")),
        InstructionSet("dotprod", 4, "llvm.aarch64.neon.sdot.v4i32.v16i8", None, ("dotprod",), signed=True),
    )
}


@cache
def instruction_set() -> InstructionSet:
    """Return the fastest of this CPU."""
    found = [each for each in INSTRUCTION_SETS.values() if host_features().issuperset(each.needs)]
    if not found or sys.platform != "linux":
        raise OSError("engine 'cpu' needs Linux on a CPU with AVX2 or dotprod; use another engine")
    return found[0]


class MachineCode:
    """Hold the functions of a module of IR as machine code, for as long as this object lives.

    write     returns the text of the module; not asked where a process has compiled it before
    cpu       LLVM's name of a CPU to compile for, with ``features`` as in "+avxvnni"; None: the one at hand
    name      by which the cache's folder keeps it; "": it is not kept
    """

    def __init__(self, write: Callable[[], str], cpu: str | None = None, features: str = "", name: str = "") -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        if cpu is None:
            cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        target = llvm.Target.from_default_triple()
        self.machine = target.create_target_machine(cpu=cpu, features=features, opt=3)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self.machine)
        facts = f"{llvm.llvm_version_info} {cpu} {features} {_sources()}"
        kept = cache_folder() / "kernels" / f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.o"
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(self._compiled(write, kept if name else None)))
        self._engine.finalize_object()

    def _compiled(self, write: Callable[[], str], kept: Path | None) -> bytes:
        if kept and kept.exists():
            return kept.read_bytes()
        module = llvm.parse_assembly(write())
        module.verify()
        compiled: bytes = self.machine.emit_object(module)
        if kept:
            with suppress(OSError):  # nothing can be written there: each process compiles
                kept.parent.mkdir(parents=True, exist_ok=True)
                part = kept.with_suffix(f".{os.getpid()}")
                part.write_bytes(compiled)
                part.rename(kept)
        return compiled

    def address(self, name: str) -> int:
        """Return where a function of the module begins."""
        return self._engine.get_function_address(name)


@cache
def _sources() -> str:
    """Return the hash of what writes IR."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
