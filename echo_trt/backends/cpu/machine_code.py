"""Compile LLVM IR to machine code of the CPU at hand, by the LLVM that numba brings: no compiler is installed."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

from echo_trt.speculation.arrays import code_folder, sealed, unsealed


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

    name      of the file that keeps the code for later processes, where numba keeps its own
    ir        makes the module's text, where it is not kept
    cpu       LLVM's name of a CPU to compile for, with ``features`` as in "+avxvnni"; None: the one at hand
    """

    def __init__(self, name: str, ir: Callable[[], str], cpu: str | None = None, features: str = "") -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        if cpu is None:
            cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        self.machine = llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3)
        folder = code_folder(_has_tiles)  # of this module
        file = folder / f"{name}.nbo" if folder else None
        made_of = sha256(f"{cpu} {features} {llvmlite.__version__}".encode() + _sources()).digest()
        kept = (file and unsealed(file)) or b""
        code = kept[len(made_of) :]
        if not kept.startswith(made_of):
            module = llvm.parse_assembly(ir())
            module.verify()
            code = self.machine.emit_object(module)
            _keep(file, sealed(made_of + code))
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self.machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Return where a function of the module begins."""
        return self._engine.get_function_address(name)


@cache
def _sources() -> bytes:
    """Return the modules that write IR, which are this folder's."""
    return b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))


def _keep(file: Path | None, content: bytes) -> None:
    with suppress(OSError):  # a full disk
        if file:
            part = file.with_suffix(f".{os.getpid()}")
            part.write_bytes(content)
            part.replace(file)
