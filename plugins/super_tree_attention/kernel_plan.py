"""The launch of the kernels, from shapes and the card alone, since the metadata's values are on the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

#: An option of Triton's compiler for every launch: it changes results by rounding, and its default changes with 3.10.
ROUNDING = {"enable_fp_fusion": True}
#: The sampling kernel's launch. Fewer registers: Triton 3.7's code for a masked row spills.
SAMPLING = {"num_warps": 8, "maxnreg": 168}
MAX_SPLITS = 32  # splits of one past; larger: a fuller card at batch 1, a longer merge
MIN_SPLIT_KEYS = 128  # least keys of a split; smaller: more programs, whose merge does not pay
#: Rows of splits' results (query tokens x heads x splits), of which more than _TAIL_SPLITS a row are kept only up to
#: this many. Larger: more splits of a few hundred tokens' past, more scratch memory (at head_dim 128 half a KB per
#: row).
SPLIT_ROWS = 1 << 17
_TAIL_SPLITS = 4  # splits of a long past on a full card; larger: a shorter tail, more merging
#: Compute capability -> KB of shared memory of a multiprocessor; others have 99.
SHARED = dict.fromkeys((80, 87), 163) | dict.fromkeys((90, 100, 103, 110), 227)
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


def steps_for(rows: int, compute_capability: int, bytes_of_value: int, head_dim: int = 128) -> Steps:
    """Return the steps of a tile, shorter where STEPS would spill registers or take more shared memory than there is.

    In float32, heads of 128 need up to 177 KB with STEPS, and most cards have 99 KB, an A100 163 KB.
    """
    if head_dim > 128:
        wide = _has_wide_products(compute_capability)
        return Steps(16, 16, 1) if bytes_of_value == 4 else Steps(32, 16, 3 if wide else 2)
    if _has_wide_products(compute_capability) or (bytes_of_value < 4 and rows < 128):
        return STEPS
    if bytes_of_value < 4:
        return Steps(32, 16, 3 if compute_capability == 80 else 1)
    return Steps(64, 32, 2) if rows == 16 else Steps(32 if rows == 64 else 16, 16, 1)


def largest_tile(head_dim: int) -> int:
    """Return the largest of ROWS whose sums, float32 [rows, head_dim], fit in registers beside the rest."""
    return 64 if head_dim > 128 else ROWS[-1]


def warps_of(rows: int) -> int:
    return 4 if rows == 16 else 8


def registers_of(rows: int) -> int:
    """Return the most registers of a thread; fewer would spill for an occupancy that shared memory rules out."""
    return 168 if rows == 16 else 255


def tiles_at_a_time(rows: int, compute_capability: int) -> int:
    """Return how many programs a multiprocessor has room for, with heads of 128 in half precision.

    A program of a larger tile takes all its registers, one of 16 rows a third of them and 70 KB of shared memory.
    """
    return min(3, SHARED.get(compute_capability, 99) // 71) if rows == ROWS[0] else 1


def _has_wide_products(compute_capability: int) -> bool:
    """Return whether a card is of Hopper's or Blackwell's kind for data centres, with their memory and registers."""
    return compute_capability // 10 in (9, 10)


@functools.lru_cache(64)
def plan(
    num_tokens: int,
    num_requests: int,
    table_entries: int,
    kv_heads: int,
    group: int,
    *,
    head_dim: int = 128,
    block: int = 32,
    processors: int = 132,
    compute_capability: int = 90,
    num_splits: int | None = None,
    rows: int | None = None,
) -> KernelPlan:
    """Plan the launch for N tokens of B requests whose block tables have ``table_entries`` entries together.

    processors          streaming multiprocessors of the card
    compute_capability  of the card, such as 90
    num_splits          overrides the most splits of a past, which then have 64 keys or more
    rows                overrides the tile
    """
    rows = rows or min(_tile_rows(num_tokens, num_requests, group), largest_tile(head_dim))
    # All requests but one may leave a tile partly empty.
    tiles = max(-(-num_tokens // (rows // group)) + num_requests - 1, 1)
    wanted = 0
    if num_splits is None:
        wanted = _filling(tiles * kv_heads, tiles_at_a_time(rows, compute_capability) * processors)
        maximum = _most_splits(wanted, num_requests, group * kv_heads * num_tokens)
        num_splits = max(min(-(-table_entries * block // MIN_SPLIT_KEYS), maximum), 1)
    return KernelPlan(rows, wanted, (tiles, kv_heads, num_splits), (num_tokens, group * kv_heads))


def _tile_rows(num_tokens: int, num_requests: int, group: int) -> int:
    """Return the smallest tile that holds twice the mean request, so that few requests read their KV twice.

    A single request needs no more than itself.
    """
    wanted = -(-num_tokens // max(num_requests, 1)) * group * (2 if num_requests > 1 else 1)
    return next((rows for rows in ROWS if rows >= wanted), ROWS[-1])


def _most_splits(wanted: int, num_requests: int, rows: int) -> int:
    """Return the most splits of a past: a request that is much longer than the mean gets more than ``wanted``.

    ``rows``: query tokens times heads. Where requests fill the card without splits, only a past of more than twice the
    mean is split, to shorten the tail.
    """
    many = wanted > 1
    longest = -(-num_requests * (2 * wanted if many else 1) // 2)
    room = max(SPLIT_ROWS // max(rows, 1), _TAIL_SPLITS)
    return min(longest, MAX_SPLITS if many else _TAIL_SPLITS, room)


def split_rows(num_tokens: int, heads: int) -> int:
    """Return how many rows of splits' results any plan for up to ``num_tokens`` leaves; it grows with the tokens."""
    rows = num_tokens * heads
    return min(rows * MAX_SPLITS, max(rows * _TAIL_SPLITS, SPLIT_ROWS))


def _filling(programs: int, at_a_time: int) -> int:
    """Return the fewest splits, up to MAX_SPLITS, with which programs fill 9/10 of the card's slots in their waves."""
    fewest = -(-at_a_time * 9 // programs)  # nine waves or more are full enough, however full the last one is
    for waves in range(1, 10):
        splits = -(-at_a_time * 9 * waves // (programs * 10))
        if programs * splits <= at_a_time * waves:
            fewest = min(fewest, splits)
    return min(fewest, MAX_SPLITS)
