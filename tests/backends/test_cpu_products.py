"""Products of the CPU engine: each format on each instruction set has the reference's bits, in any company of rows."""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import threading
from fractions import Fraction

import gguf
import numpy as np
import pytest
from damage import INSIDE, PLACED
from gguf.quants import dequantize
from numba import cfunc, types

from echo_trt.backends.cpu import machine_code
from echo_trt.backends.cpu.formats import (
    FORMATS,
    GGUF_BYTES,
    WeightFormat,
    Weights,
    fma,
    from_gguf,
    pack,
    pack_gguf,
    quantised,
    reference,
)
from echo_trt.backends.cpu.machine_code import INSTRUCTION_SETS, InstructionSet, host_features, instruction_set
from echo_trt.backends.cpu.products import Product, products
from echo_trt.backends.cpu.program import Op, Pool, Program
from echo_trt.speculation.arrays import sealed, unsealed

RNG = np.random.default_rng(0)
SETS = {name: each for name, each in INSTRUCTION_SETS.items() if host_features().issuperset(each.needs)}


def random_weights(shape: WeightFormat, rows: int, columns: int) -> Weights:
    """Draw a matrix with all integers and scales that the format can hold."""
    if shape.kind:
        floats = RNG.standard_normal((rows, columns)).astype(np.float32)
        stored = {"f32": floats, "f16": floats.astype(np.float16).view(np.uint16)}
        return Weights(shape, stored.get(shape.kind, (floats.view(np.uint32) >> 16).astype(np.uint16)))

    def factors() -> np.ndarray:
        return RNG.uniform(-0.01, 0.01, (rows, columns // shape.multiple)).astype(np.float16)

    values = RNG.integers(0, 2**shape.bits, (rows, columns), dtype=np.uint8)
    values[:, ::5] = RNG.choice([0, 2**shape.bits - 1], values[:, ::5].shape)  # sums at their limits
    scales = RNG.integers(
        0, 64 if shape.integers == 1 else 256, (rows, columns // 32, max(1, shape.integers)), np.uint8
    )
    minimums = RNG.integers(0, 64, (rows, columns // 32), np.uint8)
    return Weights(
        shape, values, factors(), factors() if shape.minimum else None,
        (scales.view(np.int8) if shape.integers == 2 else scales) if shape.integers else None,
        minimums if shape.integers and shape.minimum else None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pools() -> list[Pool]:
    return [Pool(threads) for threads in (1, 2, 3)]


@pytest.mark.parametrize("using", SETS.values(), ids=SETS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_has_the_bits_of_the_reference(name: str, using: InstructionSet, pools: list[Pool]):
    x = RNG.standard_normal((40, 512)).astype(np.float32)
    x[3, 32:64], x[4, :32], x[5] = 0, 1e-38, x[5].clip(-1, 1).round()  # 0 and 127 alone: integers at their limits
    weights = random_weights(FORMATS[name], 72 + 1, 512)
    wanted = reference(x, weights, using.bf16)
    assert np.abs(wanted - x @ weights.dequantise().T).max() < 0.02 * np.abs(wanted).max()
    rows, out = np.zeros(1, np.int64), np.empty((40, 90), np.float32)
    program = Program(products(x, rows, [Product(pack(weights, using.lanes), out)], using))
    for count in (0, 1, 2, 3, 5, 8, 9, 16, 17, 25, 40):
        for pool in pools:
            rows[0], out[:] = count, 7
            pool.run(program)
            assert np.array_equal(out[:count, :73], wanted[:count])
            assert (out[count:] == 7).all()
            assert (out[:, 73:] == 7).all()  # columns that only fill up a vector are written nowhere


def test_ten_thousand_rows_have_their_bits_in_any_company(pools: list[Pool]):
    weights = [random_weights(FORMATS[name], 24, 256) for name in ("q4_k", "q8_0")]
    lanes = instruction_set().lanes
    x = RNG.standard_normal((10_000, 256)).astype(np.float32)
    wanted = [reference(x, each) for each in weights]
    rows, batch = np.zeros(1, np.int64), np.empty((200, 256), np.float32)
    outs = [np.empty((200, 24), np.float32) for _ in weights]
    program = Program(products(batch, rows, [Product(pack(w, lanes), o) for w, o in zip(weights, outs, strict=True)]))
    left = RNG.permutation(len(x))
    while len(left):
        company, left = np.split(left, [RNG.choice([1, 2, 3, 4, 6, 8, 12, 16, 31, 64, 200])])
        rows[0] = len(company)
        batch[: len(company)] = x[company]
        pools[len(left) % 3].run(program)
        for out, each in zip(outs, wanted, strict=True):
            assert np.array_equal(out[: len(company)], each[company])


def test_products_share_activations_and_add_what_is_asked(pools: list[Pool]):
    """A bias, a residual that is the output itself, rows with a stride."""
    wide = RNG.standard_normal((6, 300)).astype(np.float32)
    x, rows = wide[:, 20:84], np.array([6])
    weights = [random_weights(FORMATS[name], 40, 64) for name in ("q4_0", "q5_1", "f32")]
    bias, out = RNG.standard_normal(40).astype(np.float32), RNG.standard_normal((3, 6, 40)).astype(np.float32)
    before = out.copy()
    lanes, pluses = instruction_set().lanes, (bias, out[1], None)
    wanted = [Product(pack(w, lanes), o, p) for w, o, p in zip(weights, out, pluses, strict=True)]
    ops = products(x, rows, wanted)
    assert [op.joins for op in ops] == [True, False, False, True]
    pools[1].run(Program(ops))
    plain = [reference(x, each) for each in weights]
    assert np.array_equal(out, np.stack([plain[0] + bias, plain[1] + before[1], plain[2]]))


def test_a_thread_that_comes_late_leaves_its_columns_to_others():
    x, rows, out = RNG.standard_normal((2, 64)).astype(np.float32), np.array([2]), np.empty((2, 400), np.float32)
    weights = random_weights(FORMATS["q8_0"], 400, 64)
    ops = products(x, rows, [Product(pack(weights, instruction_set().lanes), out)])
    Pool(1).run(Program(ops[:1]))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(ops[1].address)
    function(ops[1].args.ctypes.data, 1, 3)
    assert np.array_equal(out, reference(x, weights))


def test_a_row_that_is_no_number_spoils_itself_alone(pools: list[Pool]):
    x, rows, out = RNG.standard_normal((3, 64)).astype(np.float32), np.array([3]), np.empty((3, 16), np.float32)
    weights = random_weights(FORMATS["q4_1"], 16, 64)
    wanted = reference(x, weights)
    x[0, 3], x[2, 60] = np.nan, -np.inf
    pools[0].run(Program(products(x, rows, [Product(pack(weights, instruction_set().lanes), out)])))
    assert np.array_equal(np.isnan(out), [[True] * 16, [False] * 16, [True] * 16])
    assert np.array_equal(out[1], wanted[1])


@pytest.mark.parametrize("name", GGUF_BYTES)
def test_a_gguf_file_is_read_as_it_stands(name: str):
    size, shape = GGUF_BYTES[name], FORMATS[name]
    blocks = RNG.integers(0, 256, (40, 512 // (256 if shape.integers else 32), size), np.uint8)
    halves = RNG.uniform(-0.1, 0.1, (*blocks.shape[:2], 2)).astype(np.float16).view(np.uint8)
    if name == "q6_k":
        blocks[..., 208:] = halves[..., :2]
    else:
        blocks[..., : 2 + 2 * shape.minimum] = halves[..., : 2 + 2 * shape.minimum]
    rows = blocks.reshape(40, -1)
    weights = from_gguf(name, rows)
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert np.array_equal(weights.dequantise(), dequantize(rows, kind))
    whole, parts = pack(weights, 16), pack_gguf(name, rows, 16)
    assert np.array_equal(whole.quants[:-4096], parts.quants[:-4096])
    assert np.array_equal(whole.scales, parts.scales)


@pytest.mark.parametrize(("name", "limit"), [("q4_0", 0.09), ("q8_0", 0.006)])
def test_a_matrix_is_rounded(name: str, limit: float):
    matrix = RNG.standard_normal((16, 96)).astype(np.float32)
    matrix[2, :32] = 0
    rounded = quantised(matrix, name).dequantise()
    assert np.linalg.norm(rounded - matrix) < limit * np.linalg.norm(matrix)
    assert (rounded[2, :32] == 0).all()


def test_columns_that_fill_no_group_are_refused():
    with pytest.raises(ValueError, match="q4_k has 288 columns, must be a multiple of 256"):
        pack(Weights(FORMATS["q4_k"], np.zeros((16, 288), np.uint8)), 16)


def test_fma_rounds_once():
    """Compared with exact fractions, where the sum loses digits and where it nearly vanishes."""
    a, b, c = RNG.standard_normal((3, 300)).astype(np.float32) * np.float32(2) ** RNG.integers(-20, 20, (3, 300))
    a, b, c = (each.astype(np.float32) for each in (a, b, c))
    c[::3] = -a[::3] * b[::3]
    c[1::3] = a[1::3] * b[1::3] * np.float32(2**25)  # ties of float64 and of float32

    def nearest(value: Fraction) -> np.float32:
        guess = np.float32(float(value))
        near = [guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf))]
        return min(near, key=lambda each: (abs(Fraction(float(each)) - value), each.view(np.uint32) & 1))

    wanted = [
        nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c, strict=True)
    ]
    assert np.array_equal(fma(a, b, c), wanted)


NATIVE = types.void(types.CPointer(types.int64), types.int64, types.int64)


@cfunc(NATIVE)
def ping(args, thread, threads):
    total = 1
    for n in range(threads):
        total += args[8 * n]
    args[8 * thread + 1] = total % 1009


@cfunc(NATIVE)
def pong(args, thread, threads):
    total = 1
    for n in range(threads):
        total += args[8 * n + 1]
    args[8 * thread] = total % 1009


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_wait_for_each_other(threads: int):
    """An op reads what all threads wrote in the one before it; callers of several threads take turns."""
    pool, shared = Pool(threads), np.zeros(8 * threads, np.int64)
    program = Program([Op(each.address, shared) for each in (ping, pong)] * 50)
    callers = [threading.Thread(target=lambda: [pool.run(program) for _ in range(5)]) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    wanted = 0
    for _ in range(4 * 5 * 100):
        wanted = (1 + threads * wanted) % 1009
    assert (shared[::8] == wanted).all()
    pool.close()
    with pytest.raises(ValueError, match="threads is 0"):
        Pool(0)


def test_a_pool_that_nobody_closes_keeps_no_process_alive():
    code = (
        "from echo_trt.backends.cpu.program import Pool, Program; pool = Pool(3); pool.run(Program([])); print('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


def test_machine_code_is_kept_for_later_processes_and_made_again_where_it_is_of_another_version(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_code, "code_folder", lambda _: tmp_path)
    made = []

    def nine() -> int:
        code = machine_code.MachineCode("nine", lambda: made.append("") or "define i32 @nine() { ret i32 9 }")
        return ctypes.CFUNCTYPE(ctypes.c_int)(code.address("nine"))()

    assert (nine(), nine(), len(made)) == (9, 9, 1)
    [file] = tmp_path.iterdir()
    file.write_bytes(sealed(bytes(32) + unsealed(file)[32:]))  # made of other sources
    assert (nine(), nine(), len(made)) == (9, 9, 2)
    for number, way in enumerate([*INSIDE, *PLACED]):
        way(file, random.Random(number))
        assert (nine(), nine()) == (9, 9), way
    assert len(made) >= 2 + len([*INSIDE, *PLACED]) - 1  # the order of a single page cannot be another
