"""Multiply a few rows of activations by packed weights.

Rows are rounded to 8 bits per group of 32, then multiplied as integers, exactly; scales are applied in float32, group
after group (``formats.reference``). A row is summed in the same order whatever stands beside it and whoever computes
it, so that its bits depend on itself alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from weakref import WeakValueDictionary

import numpy as np
from llvmlite import ir

from echo_trt.backends.cpu import kernels, operators
from echo_trt.backends.cpu.formats import FORMATS, GROUP, PackedWeights
from echo_trt.backends.cpu.kernels import PLANES, SUMS
from echo_trt.backends.cpu.machine_code import InstructionSet, MachineCode, instruction_set
from echo_trt.backends.cpu.program import Op, aligned
from echo_trt.backends.cpu.tiles import ROUNDED, TILE

#: Bytes of activations that stay in a core's cache while weights go by; more rows than fit read the weights again.
CACHED = 512 * 1024
#: Rows that a kernel multiplies at once at most.
ROWS = 32


@dataclass(frozen=True)
class Product:
    """Ask for ``out = x @ weights.T``, plus something.

    out   float32 [max rows, >= N], rows of any stride
    plus  what is added at the end: a bias float32 [N], or float32 [max rows, >= N], which may be ``out``; or nothing
    """

    weights: PackedWeights
    out: np.ndarray
    plus: np.ndarray | None = None


def products(
    x: np.ndarray, rows: np.ndarray, wanted: Sequence[Product], using: InstructionSet | None = None
) -> list[Op]:
    """Return the ops that multiply ``x`` by several matrices.

    x     float32 [max rows, K], rows of any stride
    rows  int64 [1], how many rows of ``x`` there are, read in each pass. Ops of one array take turns: they share
          memory for what is rounded, so that a network needs it once
    """
    using = using or instruction_set()
    kinds = dict.fromkeys(product.weights.format.kind for product in wanted)
    rounded = {kind: _rounded(kind, x, rows) for kind in kinds if not kind or (kind == "bf16" and using.bf16)}
    ops = [_rounding_op(x, rows, each, using) for each in rounded.values()]
    for product in wanted:
        joins = product is wanted[-1]
        ops.append(_product_op(product, x, rows, rounded.get(product.weights.format.kind), using, joins))
    return ops


class Rounded:
    """Hold activations in 8 bits, in tiles of 16 rows, or in bf16, row by row.

    values   int8 [tiles, K/32, 16 rows, 32]
    factors  float32 [tiles, K/32, 16 rows]
    planes   int32 [6, tiles, K/32, 16 rows]

    A row that begins a tile begins at a multiple of ``row`` bytes of values, and of ``factor_row`` of the others.
    """

    def __init__(self, kind: str, tiles: int, groups: int) -> None:
        self.kind, self.size = kind, 2 if kind else 1
        # behind a row of bf16 a gap: rows at multiples of 4 KB have the same places of the nearest cache
        self.plane = groups * GROUP * 2 + 64 if kind else tiles * groups * ROUNDED * 4
        self.row, self.factor_row = (self.plane, 0) if kind else (groups * GROUP, groups * 4)
        self.values = aligned(tiles * ROUNDED * (self.plane if kind else groups * GROUP))
        self.factors = aligned(0 if kind else self.plane)
        self.planes = aligned(0 if kind else 6 * self.plane)


#: By kind, the address of ``rows`` and the size, as long as there are ops.
_SHARED: WeakValueDictionary[tuple[str, int, int, int], Rounded] = WeakValueDictionary()


def _rounded(kind: str, x: np.ndarray, rows: np.ndarray) -> Rounded:
    tiles, groups = -(-len(x) // ROWS) * ROWS // ROUNDED, x.shape[1] // GROUP
    key = (kind, rows.ctypes.data, tiles, groups)
    rounded = _SHARED.get(key) or Rounded(kind, tiles, groups)
    _SHARED[key] = rounded
    return rounded


def _rounding_op(x: np.ndarray, rows: np.ndarray, rounded: Rounded, using: InstructionSet) -> Op:
    values, stride = rounded.values.ctypes.data, x.strides[0]
    if rounded.kind:
        args = [rows.ctypes.data, x.ctypes.data, stride, values, rounded.plane, x.shape[1]]
        code, address = operators.round_bf16, operators.round_bf16.address
    else:
        code = _machine_code("quantise", using)
        address, parts = code.address("quantise"), [each.ctypes.data for each in (rounded.factors, rounded.planes)]
        args = [rows.ctypes.data, x.ctypes.data, values, *parts, stride, x.shape[1] // GROUP, rounded.plane]
    return Op(address, np.array(args, np.int64), keeps=(rows, x, rounded, code))


def _product_op(
    product: Product, x: np.ndarray, rows: np.ndarray, rounded: Rounded | None, using: InstructionSet, joins: bool
) -> Op:
    weights, out, plus = product.weights, product.out, product.plus
    if weights.lanes != using.lanes or weights.columns != x.shape[1]:
        raise ValueError(
            f"weights [{weights.rows}, {weights.columns}] for {weights.lanes} lanes do not fit the product"
        )
    code = _machine_code(weights.format.name, using)
    if rounded is None:
        inputs, size = [x.ctypes.data, 0, 0, x.strides[0]], 4
    else:
        plane = SUMS if weights.format.minimum else PLANES.get(weights.format.offset, 0)
        planes = rounded.planes.ctypes.data + plane * rounded.plane
        inputs, size = [rounded.values.ctypes.data, rounded.factors.ctypes.data, planes, rounded.plane], rounded.size
    added = (plus.ctypes.data, plus.strides[0] if plus.ndim > 1 else 0) if plus is not None else (0, 0)
    args = [
        rows.ctypes.data, weights.quants.ctypes.data, weights.scales.ctypes.data, -(-weights.rows // weights.lanes),
        weights.columns // weights.format.multiple, weights.rows, *inputs, out.ctypes.data, out.strides[0], *added,
        max(1, CACHED // (weights.columns * size * ROWS)) * ROWS // TILE, 0,
    ]  # fmt: skip
    keeps = (rows, weights, x, rounded, out, plus, code)
    return Op(code.address("product"), np.array(args, np.int64), joins, keeps, claims=len(args) - 1)


@cache
def _machine_code(name: str, using: InstructionSet) -> MachineCode:
    def write() -> str:
        module = ir.Module()
        if name == "quantise":
            kernels.quantise(module)
        else:
            kernels.product(module, FORMATS[name], using)
        return str(module)

    features = "" if using.cpu is None else ",".join("+" + each for each in using.needs)
    return MachineCode(write, using.cpu, features, f"{name}-{using.name}")
