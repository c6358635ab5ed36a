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

from echo_trt.backends.cpu import kernels
from echo_trt.backends.cpu.formats import FORMATS, GROUP, PackedWeights
from echo_trt.backends.cpu.kernels import PLANES, SUMS, TILE
from echo_trt.backends.cpu.machine_code import InstructionSet, MachineCode, instruction_set
from echo_trt.backends.cpu.program import Op, aligned

#: Bytes of activations that stay in a core's cache while weights go by; more rows than fit read the weights again.
CACHED = 512 * 1024


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
    integers = any(not product.weights.format.kind for product in wanted)
    rounded = _rounded(x, rows) if integers else None
    ops = [_quantise_op(x, rows, rounded, using)] if rounded else []
    for product in wanted:
        joins = product is wanted[-1]
        ops.append(_product_op(product, x, rows, rounded, using, joins))
    return ops


class _Rounded:
    """Hold activations in 8 bits, in tiles of 8 rows.

    values   int8 [tiles, K/32, 8 rows, 32]
    factors  float32 [tiles, K/32, 8 rows]
    planes   int32 [6, tiles, K/32, 8 rows]
    """

    def __init__(self, tiles: int, groups: int) -> None:
        self.values = aligned(tiles * groups * TILE * GROUP)
        self.factors = aligned(tiles * groups * TILE * 4)
        self.plane = tiles * groups * TILE * 4
        self.planes = aligned(6 * self.plane)


#: By the address of ``rows`` and the size, as long as there are ops.
_SHARED: WeakValueDictionary[tuple[int, int, int], _Rounded] = WeakValueDictionary()


def _rounded(x: np.ndarray, rows: np.ndarray) -> _Rounded:
    tiles, groups = -(-len(x) // TILE), x.shape[1] // GROUP
    key = (rows.ctypes.data, tiles, groups)
    rounded = _SHARED.get(key) or _Rounded(tiles, groups)
    _SHARED[key] = rounded
    return rounded


def _quantise_op(x: np.ndarray, rows: np.ndarray, rounded: _Rounded, using: InstructionSet) -> Op:
    code = _machine_code("quantise", using)
    addresses = [rows, x, rounded.values, rounded.factors, rounded.planes]
    args = [each.ctypes.data for each in addresses] + [x.strides[0], x.shape[1] // GROUP, rounded.plane]
    return Op(code.address("quantise"), np.array(args, np.int64), keeps=(rows, x, rounded, code))


def _product_op(
    product: Product, x: np.ndarray, rows: np.ndarray, rounded: _Rounded | None, using: InstructionSet, joins: bool
) -> Op:
    weights, out, plus = product.weights, product.out, product.plus
    if weights.lanes != using.lanes or weights.columns != x.shape[1]:
        raise ValueError(
            f"weights [{weights.rows}, {weights.columns}] for {weights.lanes} lanes do not fit the product"
        )
    code = _machine_code(weights.format.name, using)
    if weights.format.kind:
        inputs = [x.ctypes.data, 0, 0, x.strides[0]]
    else:
        plane = SUMS if weights.format.minimum else PLANES[weights.format.offset]
        planes = rounded.planes.ctypes.data + plane * rounded.plane
        inputs = [rounded.values.ctypes.data, rounded.factors.ctypes.data, planes, rounded.plane]
    added = (plus.ctypes.data, plus.strides[0] if plus.ndim > 1 else 0) if plus is not None else (0, 0)
    args = [
        rows.ctypes.data, weights.quants.ctypes.data, weights.scales.ctypes.data, -(-weights.rows // weights.lanes),
        weights.columns // weights.format.multiple, weights.rows, *inputs, out.ctypes.data, out.strides[0], *added,
        max(2, CACHED // (weights.columns * TILE) // 2 * 2), 0,
    ]  # fmt: skip
    keeps = (rows, weights, x, rounded, out, plus, code)
    return Op(code.address("product"), np.array(args, np.int64), joins, keeps, claims=len(args) - 1)


@cache
def _machine_code(name: str, using: InstructionSet) -> MachineCode:
    module = ir.Module()
    if name == "quantise":
        kernels.quantise(module)
    else:
        kernels.product(module, FORMATS[name], using)
    features = "" if using.cpu is None else ",".join("+" + each for each in using.needs)
    return MachineCode(str(module), using.cpu, features)
