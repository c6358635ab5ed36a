"""How the kernels are launched: from shapes and the card alone, since the metadata's values are on the device."""

from __future__ import annotations

from dataclasses import dataclass

KEYS = 64  # keys of one step of the inner loop
NEW_KEYS = 32  # the same over the new tokens, where the tree mask takes registers too
MAX_SPLITS = 32
MIN_SPLIT_KEYS = 128  # a shorter split does not pay its merge
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

    @property
    def warps(self) -> int:
        return warps_of(self.rows)


def warps_of(rows: int) -> int:
    return 4 if rows == 16 else 8


def registers_of(rows: int) -> int:
    """The most registers of a thread, so that ptxas does not spill for an occupancy that shared memory rules out."""
    return 168 if rows == 16 else 255


def rows_for(compute_capability: int) -> tuple[int, ...]:
    """The tiles of a card such as 90. Without the wider products of sm_90 and sm_100 a tile of 128 spills registers."""
    return ROWS if compute_capability // 10 in (9, 10) else ROWS[:2]


def plan(
    num_tokens: int,
    num_requests: int,
    table_entries: int,
    kv_heads: int,
    group: int,
    *,
    block: int = 32,
    processors: int = 132,
    compute_capability: int = 90,
    num_splits: int | None = None,
    rows: int | None = None,
) -> Plan:
    """The launch for N tokens of B requests whose block tables have ``table_entries`` entries together.

    ``processors``: the card's streaming multiprocessors; ``compute_capability``: such as 90. ``num_splits``: at most so
    many splits of a past, of 64 keys or more each, instead of the choice made here. ``rows``: a tile, likewise.
    """
    rows = rows or _tile_rows(num_tokens, num_requests, group, rows_for(compute_capability))
    tokens = rows // group
    tiles = -(-num_tokens // tokens) if num_requests == 1 else num_tokens // tokens + num_requests
    tiles = max(tiles, 1)
    if num_splits is None:
        slots = processors * (3 if rows == 16 else 1)  # programs that run at a time, by their registers
        num_splits, split_keys = _splits(tiles * kv_heads, slots, num_requests, table_entries * block)
    else:
        split_keys = KEYS
    return Plan(rows, split_keys, (tiles, kv_heads, num_splits), (num_tokens, kv_heads * group))


def _tile_rows(num_tokens: int, num_requests: int, group: int, choice: tuple[int, ...]) -> int:
    """The smallest tile that holds twice the mean request, so that few requests need their KV read twice."""
    mean = -(-num_tokens // max(num_requests, 1)) * group
    wanted = mean if num_requests == 1 else 2 * mean
    return next((rows for rows in choice if rows >= wanted), choice[-1])


def _splits(programs: int, slots: int, num_requests: int, keys: int) -> tuple[int, int]:
    """The most splits of a past and the least keys in one: as many as fill whole waves of the card, were all alike.

    Where requests fill the card without splits, only a past of more than twice the mean is split, against the tail.
    """
    mean_keys = -(-keys // max(num_requests, 1))
    fills = [_fill(programs * splits, slots) for splits in range(1, MAX_SPLITS + 1)]
    wanted = 1 + next((i for i, fill in enumerate(fills) if fill >= 0.9), fills.index(max(fills)))
    share = -(-mean_keys // wanted) if wanted > 1 else 2 * mean_keys
    split_keys = max(MIN_SPLIT_KEYS, -(-share // KEYS) * KEYS)
    most = MAX_SPLITS if wanted > 1 else 4
    return max(1, min(-(-keys // split_keys), most)), split_keys


def _fill(programs: int, slots: int) -> float:
    """The share of the slots that work, over the waves that the programs take."""
    return programs / (-(-programs // slots) * slots)
