"""Compile LLVM IR to machine code of the CPU at hand, by the LLVM that numba brings: no compiler is installed."""

from __future__ import annotations

from functools import cache

import llvmlite.binding as llvm


@cache
def host_features() -> frozenset[str]:
    """Return the features of this CPU that LLVM knows, for example ``avx512vnni``."""
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


class MachineCode:
    """Hold the functions of a module of IR as machine code, for as long as this object lives.

    ir        text of the module
    cpu       LLVM's name of a CPU to compile for, with ``features`` as in "+avxvnni"; None: the one at hand
    """

    def __init__(self, ir: str, cpu: str | None = None, features: str = "") -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        if cpu is None:
            cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        target = llvm.Target.from_default_triple()
        self.machine = target.create_target_machine(cpu=cpu, features=features, opt=3)
        module = llvm.parse_assembly(ir)
        module.verify()
        self._engine = llvm.create_mcjit_compiler(module, self.machine)
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Return where a function of the module begins."""
        return self._engine.get_function_address(name)
