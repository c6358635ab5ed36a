"""The launch of the kernels, from shapes and the card alone, since the metadata's values are on the device."""

from __future__ import annotations

import functools
import itertools
import operator
from dataclasses import dataclass
from typing import Any

MAX_SPLITS = 32  # splits of one past; larger: a fuller card at batch 1, a longer merge
MIN_SPLIT_KEYS = 128  # least keys of a split; smaller: more programs, whose merge does not pay
#: Rows of splits' results (query tokens x heads x splits), of which more than _TAIL_SPLITS a row are kept only up to
#: this many. Larger: more splits of a few hundred tokens' past, more scratch memory (at head_dim 128 half a KB per
#: row).
SPLIT_ROWS = 1 << 17
_TAIL_SPLITS = 4  # splits of a long past on a full card; larger: a shorter tail, more merging
ROWS = (16, 64, 128)  # tile sizes: query tokens x heads of one program. Larger: keys are read less often, more padding


@dataclass(frozen=True)
class KernelPlan:
    """A launch with tiles of ``rows``.

    wanted_splits  splits of a past of the mean length, from which the kernel computes a split's keys
    grid           (tiles, Hk, splits) of ``attention``
    combine_grid   (N, Hq) of ``combine``, which is launched if there are several splits
    """

    rows: int
    wanted_splits: int
    grid: tuple[int, int, int]
    combine_grid: tuple[int, int]

    @property
    def num_splits(self) -> int:
        return self.grid[2]


class Whole:
    """Arithmetic on whole numbers, an ``ops`` of the rules below.

    The other one is tensorrt.plugin, whose symbols must come first in a sum or product and have no other operation.
    """

    cdiv, min, max = staticmethod(lambda a, b: -(-a // b)), staticmethod(min), staticmethod(max)


@dataclass(frozen=True)
class Steps:
    """The sizes of the kernel's loops.

    keys      keys of a step over the past; larger: fewer steps, more shared memory
    new_keys  the same over the new tokens; larger: spills, since the tree mask takes registers too
    stages    steps whose loads are in flight; larger: more shared memory
    """

    keys: int
    new_keys: int
    stages: int


STEPS = Steps(64, 32, 3)
#: Bytes of dynamic shared memory that a kernel may have unless its launcher raises the limit.
PLAIN_SHARED = 48 * 1024


def modest_steps(rows: int, compute_capability: int) -> Steps:
    """Return the steps of a tile of 16 or 64 rows that needs no more than PLAIN_SHARED."""
    if rows == 16:
        return Steps(64, 32, 2)
    return Steps(32, 16, 1 if compute_capability >= 100 else 2)


def steps_for(rows: int, compute_capability: int, bytes_of_value: int) -> Steps:
    """Return the steps of a tile whose launcher raises the limit of shared memory.

    In float32, heads of 128 need up to 177 KB with usual steps, and most cards have 99 KB, an A100 163 KB.
    """
    usual = bytes_of_value < 4 or compute_capability // 10 in (9, 10)
    return STEPS if usual else modest_steps(rows, compute_capability)


def warps_of(rows: int) -> int:
    return 4 if rows == 16 else 8


def registers_of(rows: int) -> int:
    """Return the most registers of a thread; fewer would spill for an occupancy that shared memory rules out."""
    return 168 if rows == 16 else 255


def rows_for(compute_capability: int) -> tuple[int, ...]:
    """Return the tiles of a card: without the wider products of sm_90 and sm_100 a tile of 128 spills registers."""
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
    max_rows: int = ROWS[-1],
    ops: Any = Whole,
) -> KernelPlan:
    """Plan the launch for N tokens of B requests whose block tables have ``table_entries`` entries together.

    processors          streaming multiprocessors of the card
    compute_capability  of the card, such as 90
    num_splits          overrides the most splits of a past, which then have 64 keys or more
    rows                overrides the tile
    max_rows            the largest tile
    ops                 arithmetic; symbols, with their ``ops``, make a plan of symbols
    """
    tiles_of_card = tuple(size for size in rows_for(compute_capability) if size <= max_rows)
    rows = rows or _tile_rows(num_tokens, num_requests, group, tiles_of_card, ops)
    tiles = tile_count(num_tokens, num_requests, rows, group, ops)
    wanted: Any = 0
    if num_splits is None:
        at_a_time = (_exceeds(rows, ROWS[0], ops) * -2 + 3) * processors  # by their registers, three small tiles
        wanted = _filling(tiles * kv_heads, at_a_time, ops)
        maximum = _most_splits(wanted, num_requests, group * kv_heads * num_tokens, ops)
        num_splits = ops.max(ops.min(ops.cdiv(table_entries * block, MIN_SPLIT_KEYS), maximum), 1)
    return KernelPlan(rows, wanted, (tiles, kv_heads, num_splits), (num_tokens, group * kv_heads))


def _tile_rows(num_tokens: Any, num_requests: Any, group: Any, choice: tuple[int, ...], ops: Any) -> Any:
    """Return the smallest tile that holds twice the mean request, so that few requests read their KV twice.

    A single request needs no more than itself.
    """
    wanted = ops.cdiv(num_tokens, ops.max(num_requests, 1)) * group * (_exceeds(num_requests, 1, ops) + 1)
    steps = (_exceeds(wanted, less, ops) * (more - less) for less, more in itertools.pairwise(choice))
    return functools.reduce(operator.add, steps) + choice[0]


def tile_count(num_tokens: Any, num_requests: Any, rows: Any, group: Any, ops: Any = Whole) -> Any:
    """Return how many tiles hold the tokens of any requests; all requests but one may leave a tile partly empty."""
    return ops.max(ops.cdiv(num_tokens, rows // group) + num_requests - 1, 1)


def _most_splits(wanted: Any, num_requests: Any, rows: Any, ops: Any) -> Any:
    """Return the most splits of a past: a request that is much longer than the mean gets more than ``wanted``.

    ``rows``: query tokens times heads. Where requests fill the card without splits, only a past of more than twice the
    mean is split, to shorten the tail.
    """
    many = _exceeds(wanted, 1, ops)
    longest = ops.cdiv((wanted * 2 - 1) * many * num_requests + num_requests, 2)
    maximum = many * (MAX_SPLITS - _TAIL_SPLITS) + _TAIL_SPLITS
    return ops.min(ops.min(longest, maximum), ops.max((rows * 0 + SPLIT_ROWS) // ops.max(rows, 1), _TAIL_SPLITS))


def split_rows(num_tokens: Any, heads: Any, ops: Any = Whole) -> Any:
    """Return how many rows of splits' results any plan for up to ``num_tokens`` leaves; it grows with the tokens."""
    rows = num_tokens * heads
    return ops.min(rows * MAX_SPLITS, ops.max(rows * _TAIL_SPLITS, SPLIT_ROWS))


def _filling(programs: Any, at_a_time: Any, ops: Any) -> Any:
    """Return the fewest splits, up to MAX_SPLITS, with which programs fill 9/10 of the card's slots in their waves."""
    fewest = ops.cdiv(at_a_time * 9, programs)  # nine waves or more are full enough, however full the last one is
    for waves in range(1, 10):
        splits = ops.cdiv(at_a_time * (9 * waves), programs * 10)
        fewest = ops.min(fewest, _exceeds(programs * splits, at_a_time * waves, ops) * MAX_SPLITS + splits)
    return ops.min(fewest, MAX_SPLITS)


def _exceeds(number: Any, limit: Any, ops: Any) -> Any:
    """Return 1 where ``number`` exceeds ``limit``, else 0."""
    return ops.min(ops.max(number - limit, 0), 1)
