"""Sizes that the plugins derive from shapes, in whole numbers or in TensorRT's symbols for them."""

from __future__ import annotations

from typing import Any

from super_tree_attention.kernel_plan import MAX_SPLITS, MIN_SPLIT_KEYS, ROWS

#: The kernels' parameters as TensorRT passes them: inputs, integers, outputs (tensorrt_plugin.relist_parameters). Of
#: attention, two outputs are the caches, which it writes by its inputs; of combine, the fifth input is its output.
ATTENTION_ORDER = [*range(16), None, None]
COMBINE_ORDER = [0, 1, 2, 3, None, 4, 5, 6, 7]


class Whole:
    """What ``split_count`` asks of its operands, for whole numbers."""

    cdiv, min, max = staticmethod(lambda a, b: -(-a // b)), staticmethod(min), staticmethod(max)


def tile_count(tokens: Any, requests: Any, rows: int, group: int) -> Any:
    """Programs that hold the query tokens of any requests, each of which may leave one partly empty."""
    return tokens // (rows // group) + requests


def split_count(
    tokens: Any, requests: Any, entries: Any, group: Any, kv_heads: int, block: int, processors: int, ops: Any
) -> Any:
    """How many splits of a past: two programs a multiprocessor, were all requests alike, and 128 keys in each.

    ``ops`` has cdiv, min and max: Whole, or tensorrt.plugin for symbols. An engine's scratch memory is of this
    extent, so it follows from N, B and the table's entries alone, whatever tile an optimisation profile has chosen.
    """
    programs = (tokens * group // ROWS[1] + requests) * kv_heads
    wanted = ops.min(ops.cdiv(2 * processors, programs), MAX_SPLITS)
    return ops.max(ops.min(wanted, ops.cdiv(entries * block, MIN_SPLIT_KEYS)), 1)
