"""Run a prepared list of native calls by a pool of threads: a pass of a network is one call from Python.

An op is a native function ``void f(const void *args, int64 thread, int64 threads)``. All threads of a pool walk the
list, each computes its share of an op, and waits for the others before the next one.
"""

from __future__ import annotations

import ctypes
import platform
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from echo_trt.backends.cpu.machine_code import MachineCode

#: Looks at a cell before its thread sleeps, about 40 ns each. More keep a core that another process may want; fewer
#: pay a call of the system for a short wait.
SPINS = 1000
Argument = np.ndarray | int | float | None

# A cell is {value, sleepers}, two i32 on a cache line of their own. The pool's lines: 0 the cell of passes, 1 the cell
# of barriers, 2 how many threads have come to a barrier, 3 {ops, count, threads}. A count below 0 ends the workers.
_EXECUTOR = """
declare i64 @syscall(i64, ...)
declare void PAUSED

define internal void @await(ptr %cell, i32 %seen) {
entry:
  %sleepers = getelementptr i32, ptr %cell, i64 1
  br label %look
look:
  %spins = phi i32 [0, %entry], [%more, %pause], [SPINS, %sleep]
  %value = load atomic i32, ptr %cell seq_cst, align 4
  %same = icmp eq i32 %value, %seen
  br i1 %same, label %wait, label %done
wait:
  %short = icmp ult i32 %spins, SPINS
  br i1 %short, label %pause, label %sleep
pause:
  call void PAUSE
  %more = add i32 %spins, 1
  br label %look
sleep:
  %up = atomicrmw add ptr %sleepers, i32 1 seq_cst
  %woken = call i64 (i64, ...) @syscall(i64 FUTEX, ptr %cell, i64 128, i32 %seen, ptr null)
  %down = atomicrmw sub ptr %sleepers, i32 1 seq_cst
  br label %look
done:
  ret void
}

define internal void @advance(ptr %cell) {
  %old = atomicrmw add ptr %cell, i32 1 seq_cst
  %sleepers = getelementptr i32, ptr %cell, i64 1
  %asleep = load atomic i32, ptr %sleepers seq_cst, align 4
  %any = icmp ne i32 %asleep, 0
  br i1 %any, label %wake, label %done
wake:
  %woken = call i64 (i64, ...) @syscall(i64 FUTEX, ptr %cell, i64 129, i32 2147483647)
  br label %done
done:
  ret void
}

define internal void @barrier(ptr %pool, i64 %threads) {
  %cell = getelementptr i8, ptr %pool, i64 64
  %come = getelementptr i8, ptr %pool, i64 128
  %seen = load atomic i32, ptr %cell seq_cst, align 4
  %before = atomicrmw add ptr %come, i64 1 seq_cst
  %now = add i64 %before, 1
  %all = icmp eq i64 %now, %threads
  br i1 %all, label %last, label %others
last:
  store atomic i64 0, ptr %come seq_cst, align 8
  call void @advance(ptr %cell)
  ret void
others:
  call void @await(ptr %cell, i32 %seen)
  ret void
}

define internal void @walk(ptr %pool, ptr %ops, i64 %count, i64 %thread, i64 %threads) {
entry:
  br label %head
head:
  %i = phi i64 [0, %entry], [%next, %tail]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %body, label %done
body:
  %op = getelementptr [4 x i64], ptr %ops, i64 %i
  %args.at = getelementptr i64, ptr %op, i64 1
  %joins.at = getelementptr i64, ptr %op, i64 2
  %function = load ptr, ptr %op
  %args = load ptr, ptr %args.at
  %joins = load i64, ptr %joins.at
  call void %function(ptr %args, i64 %thread, i64 %threads)
  %waits = icmp ne i64 %joins, 0
  br i1 %waits, label %join, label %tail
join:
  call void @barrier(ptr %pool, i64 %threads)
  br label %tail
tail:
  %next = add i64 %i, 1
  br label %head
done:
  ret void
}

define void @run(ptr %pool, ptr %ops, i64 %count) {
entry:
  br label %head
head:
  %i = phi i64 [0, %entry], [%next, %body]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %body, label %begin
body:
  %cell.at = getelementptr [4 x i64], ptr %ops, i64 %i, i64 3
  %cell = load ptr, ptr %cell.at
  store i64 0, ptr %cell
  %next = add i64 %i, 1
  br label %head
begin:
  %ops.at = getelementptr i8, ptr %pool, i64 192
  %count.at = getelementptr i8, ptr %pool, i64 200
  %threads.at = getelementptr i8, ptr %pool, i64 208
  store ptr %ops, ptr %ops.at
  store i64 %count, ptr %count.at
  %threads = load i64, ptr %threads.at
  call void @advance(ptr %pool)
  call void @walk(ptr %pool, ptr %ops, i64 %count, i64 0, i64 %threads)
  ret void
}

define void @work(ptr %pool, i64 %thread) {
entry:
  %ops.at = getelementptr i8, ptr %pool, i64 192
  %count.at = getelementptr i8, ptr %pool, i64 200
  %threads.at = getelementptr i8, ptr %pool, i64 208
  %threads = load i64, ptr %threads.at
  br label %pass
pass:
  %seen = phi i32 [0, %entry], [%now, %busy]
  call void @await(ptr %pool, i32 %seen)
  %now = add i32 %seen, 1
  %ops = load ptr, ptr %ops.at
  %count = load i64, ptr %count.at
  %ended = icmp slt i64 %count, 0
  br i1 %ended, label %done, label %busy
busy:
  call void @walk(ptr %pool, ptr %ops, i64 %count, i64 %thread, i64 %threads)
  br label %pass
done:
  ret void
}
"""


@dataclass(frozen=True)
class Op:
    """Call a native function with a record of int64: addresses, sizes.

    args   int64 [...], read by the function; its values may change between passes
    joins  whether threads wait for each other after it; not where the next op reads nothing that this one writes
    keeps  what must live as long as the op: arrays whose addresses stand in ``args``, machine code
    claims index in ``args`` of what threads have taken of the op's work; 0 at the beginning of each pass
    """

    address: int
    args: np.ndarray
    joins: bool = True
    keeps: tuple[object, ...] = ()
    claims: int | None = None

    @classmethod
    def of(cls, operator: Any, *args: Argument, keeps: Sequence[object] = ()) -> Op:
        """Make a record of addresses of arrays, integers, and float32 numbers; None is no array."""
        record = np.zeros(len(args), np.int64)
        for i, value in enumerate(args):
            if isinstance(value, float):
                record[i : i + 1].view(np.float32)[0] = value
            else:
                record[i] = value.ctypes.data if isinstance(value, np.ndarray) else value or 0
        kept = (operator, *(value for value in args if isinstance(value, np.ndarray)), *keeps)
        return cls(operator.address, record, keeps=kept)


class Program:
    """Hold a list of ops in the order of a pass; threads wait for each other after the last one in any case."""

    def __init__(self, ops: Sequence[Op]) -> None:
        self.ops = tuple(ops)
        self._unclaimed = np.zeros(1, np.int64)
        cells = [self._unclaimed if op.claims is None else op.args[op.claims :] for op in self.ops]
        rows = [
            (op.address, op.args.ctypes.data, int(op.joins), cell.ctypes.data)
            for op, cell in zip(self.ops, cells, strict=True)
        ]
        self.table = np.array(rows, np.int64).reshape(-1, 4)
        self.table[-1:, 2] = 1


class Pool:
    """Run programs by ``threads`` threads, of which the caller is one. The others sleep between passes.

    One pass runs at a time; callers of other threads wait. The threads end with the pool, and with the process.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}, must be at least 1")
        self.threads = threads
        self._lines = aligned(256)
        self._lines[:] = 0
        self._lines[208:216].view(np.int64)[0] = threads
        self._lock = threading.Lock()
        pool, self._run = self._lines.ctypes.data, _run()
        workers = [threading.Thread(target=_work(), args=(pool, n), daemon=True) for n in range(1, threads)]
        for worker in workers:
            worker.start()
        self.close = weakref.finalize(self, _end, self._run, self._lines, workers)

    def run(self, program: Program) -> None:
        """Run a program's ops in their order, and return after the last one; the interpreter's lock is free."""
        with self._lock:
            self._run(self._lines.ctypes.data, program.table.ctypes.data, len(program.table))


def aligned(size: int, boundary: int = 64) -> np.ndarray:
    """Allocate uint8 [size] that begins at a multiple of ``boundary`` bytes; its values are not set."""
    buffer = np.empty(size + boundary, np.uint8)
    begin = -buffer.ctypes.data % boundary
    return buffer[begin : begin + size]


def _end(run: ctypes._CFuncPtr, lines: np.ndarray, workers: list[threading.Thread]) -> None:
    run(lines.ctypes.data, None, -1)
    for worker in workers:
        worker.join()


@cache
def _executor() -> MachineCode:
    arm = platform.machine() in ("aarch64", "arm64")
    pause = ("@llvm.aarch64.hint(i32)", "@llvm.aarch64.hint(i32 1)") if arm else ("@llvm.x86.sse2.pause()",) * 2
    words = {"PAUSED": pause[0], "PAUSE": pause[1], "SPINS": str(SPINS), "FUTEX": "98" if arm else "202"}
    ir = _EXECUTOR
    for word, value in words.items():
        ir = ir.replace(word, value)
    return MachineCode(lambda: ir)


@cache
def _run() -> ctypes._CFuncPtr:
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    return prototype(_executor().address("run"))


@cache
def _work() -> ctypes._CFuncPtr:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(_executor().address("work"))
