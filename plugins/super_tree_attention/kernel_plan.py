"""How the kernels are launched: from shapes and the card alone, since the metadata's values are on the device."""

from __future__ import annotations

import functools
import itertools
import operator
from dataclasses import dataclass
from typing import Any

KEYS = 64  # keys of one step of the inner loop
NEW_KEYS = 32  # the same over the new tokens, where the tree mask takes registers too
MAX_SPLITS = 32
MIN_SPLIT_KEYS = 128  # a shorter split does not pay its merge
_TAIL_SPLITS = 4  # of one long past, where the card is full anyway
ROWS = (16, 64, 128)  # query tokens x heads of one program: the tile sizes that are compiled


@dataclass(frozen=True)
class Plan:
    """rows: the tile; grid (tiles, Hk, splits) of ``attention``; combine_grid (N, Hq), launched if splits > 1."""

    rows: int
    split_keys: int
    grid: tuple[int, int, int]
    combine_grid: tuple[int, int]

    @property
    def num_splits(self) -> int:
        return self.grid[2]


class Whole:
    """Arithmetic on whole numbers. The rules below ask an ``ops`` for it: this one, or tensorrt.plugin for its symbols,
    which must come first in a sum or product and know no other operation."""

    cdiv, min, max = staticmethod(lambda a, b: -(-a // b)), staticmethod(min), staticmethod(max)


def warps_of(rows: int) -> int:
    return 4 if rows == 16 else 8


def registers_of(rows: int) -> int:
    """The most registers of a thread, so that ptxas does not spill for an occupancy that shared memory rules out."""
    return 168 if rows == 16 else 255


def rows_for(compute_capability: int) -> tuple[int, ...]:
    """The tiles of a card such as 90. Without the wider products of sm_90 and sm_100 a tile of 128 spills registers."""
    return ROWS if compute_capability // 10 in (9, 10) else ROWS[:2]


def plan(
    num_tokens: Any,
    num_requests: Any,
    table_entries: Any,
    kv_heads: int,
    group: Any,
    *,
    block: int = 32,
    processors: int = 132,
    compute_capability: int = 90,
    num_splits: int | None = None,
    rows: int | None = None,
    ops: Any = Whole,
) -> Plan:
    """The launch for N tokens of B requests whose block tables have ``table_entries`` entries together.

    ``processors``: the card's streaming multiprocessors; ``compute_capability``: such as 90. ``num_splits``: at most so
    many splits of a past, of 64 keys or more each, instead of the choice made here. ``rows``: a tile, likewise.
    With symbols, and ``ops`` for them, the plan is of symbols too.
    """
    rows = rows or _tile_rows(num_tokens, num_requests, group, rows_for(compute_capability), ops)
    tiles = tile_count(num_tokens, num_requests, rows, group, ops)
    if num_splits is None:
        num_splits, split_keys = _splits(tiles * kv_heads, rows, num_requests, table_entries * block, processors, ops)
    else:
        split_keys = KEYS
    return Plan(rows, split_keys, (tiles, kv_heads, num_splits), (num_tokens, group * kv_heads))


def _tile_rows(num_tokens: Any, num_requests: Any, group: Any, choice: tuple[int, ...], ops: Any) -> Any:
    """The smallest tile that holds twice the mean request, so that few requests need their KV read twice. One request
    alone is its own mean."""
    wanted = ops.cdiv(num_tokens, ops.max(num_requests, 1)) * group * (_exceeds(num_requests, 1, ops) + 1)
    steps = (_exceeds(wanted, less, ops) * (more - less) for less, more in itertools.pairwise(choice))
    return functools.reduce(operator.add, steps) + choice[0]


def tile_count(num_tokens: Any, num_requests: Any, rows: Any, group: Any, ops: Any = Whole) -> Any:
    """Tiles that hold the query tokens of any requests, each but one of which may leave a tile partly empty."""
    return ops.max(ops.cdiv(num_tokens, rows // group) + num_requests - 1, 1)


def _splits(programs: Any, rows: Any, num_requests: Any, keys: Any, processors: int, ops: Any) -> tuple[Any, Any]:
    """The most splits of a past and the least keys in one: as many as fill whole waves of the card, were all alike.

    ``programs``: tiles times KV heads; ``keys``: what all block tables together have room for. Where requests fill the
    card without splits, only a past of more than twice the mean is split, against the tail.
    """
    at_a_time = (_exceeds(rows, ROWS[0], ops) * -2 + 3) * processors  # by their registers, three small tiles
    mean_keys = ops.cdiv(keys, ops.max(num_requests, 1))
    wanted = _filling(programs, at_a_time, ops)
    many = _exceeds(wanted, 1, ops)
    share = ops.cdiv(mean_keys, wanted) + mean_keys * (many * -1 + 1)  # twice the mean unless many
    split_keys = ops.max(ops.cdiv(share, KEYS) * KEYS, MIN_SPLIT_KEYS)
    most = many * (MAX_SPLITS - _TAIL_SPLITS) + _TAIL_SPLITS
    return ops.max(ops.min(ops.cdiv(keys, split_keys), most), 1), split_keys


def _filling(programs: Any, at_a_time: Any, ops: Any) -> Any:
    """The fewest splits, up to MAX_SPLITS, by which programs keep 9/10 of the card's slots busy over their waves."""
    fewest = ops.cdiv(at_a_time * 9, programs)  # nine waves and more are full enough, whatever the last holds
    for waves in range(1, 10):
        splits = ops.cdiv(at_a_time * (9 * waves), programs * 10)
        fewest = ops.min(fewest, _exceeds(programs * splits, at_a_time * waves, ops) * MAX_SPLITS + splits)
    return ops.min(fewest, MAX_SPLITS)


def _exceeds(number: Any, limit: Any, ops: Any) -> Any:
    """1 or 0."""
    return ops.min(ops.max(number - limit, 0), 1)
