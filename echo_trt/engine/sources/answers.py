"""The source of learnt answers: what texts of the same sender have gone on with behind the same last tokens.

Each salt of the prefix cache has a table of its own, so no request is proposed what another key's has said. It learns
while answers are written, so that samples of one prompt propose to each other; retrieval from a server's own answers,
as in SuffixDecoding (arXiv 2411.04975), with a table of fixed size in place of trees.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from hashlib import blake2b

import numpy as np

from echo_trt.engine.assemble import Networks
from echo_trt.engine.batch import InputBatch
from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.chains import NO_CHAINS, Chains
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.ngrams import SEED, longer_by
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import ChainSource, StepContext
from echo_trt.speculation.sources import ANSWER

CONTEXT = 4  # tokens of a key; smaller: more proposals, of which fewer are right
BUCKETS, WAYS = 1 << 15, 8  # of a table, 2 MiB: about 260,000 contexts; larger: older answers are known longer
TABLES = 64  # the salts of the latest requests; larger: more memory where many keys come in turn
KEPT = 4  # tables that outlive the process, of the latest salts; larger: more to write each minute
POINTS = 15  # of a token at most; larger: one that does not follow any more is proposed longer
MARK = f"answers of {BUCKETS}, {CONTEXT}/"  # before the digest of a salt
RUN = 8  # tokens that were right in a row, with which a request is sure to repeat an answer


class AnswerSource(ChainSource):
    """Proposes a chain below each root whose last ``CONTEXT`` tokens an answer has had before."""

    def __init__(self, batch: InputBatch, length: int):
        """``length``: tokens of a chain at most."""
        self._batch, self._length = batch, length
        self._tables: OrderedDict[str, np.ndarray] = OrderedDict()  # by the digest of a salt
        self._table = [np.zeros((0, WAYS), np.uint64)] * batch.count  # of each slot's request
        self._epoch = np.full(batch.count, -1)  # admission numbers
        self._followed = np.zeros(batch.count, np.int64)  # tokens of a slot's text
        self._right = np.zeros(batch.count, np.int64)  # tokens in a row that the table had

    def forces(self, load: StepContext) -> bool:
        self._begin(load)
        return bool((self._right[load.slots[load.max_draft_len > 0]] >= RUN).any())

    def propose(self, load: StepContext) -> Chains:
        self._begin(load)
        tokens, log_p = np.full((len(load.slots), self._length), -1), np.zeros((len(load.slots), self._length))
        for row, slot in enumerate(load.slots.tolist()):
            text = self._batch.tokens[slot, : self._batch.length[slot]]
            _chain(self._table[slot], text[-CONTEXT:].astype(np.int64), self._right[slot], tokens[row], log_p[row])
        found = np.flatnonzero(tokens[:, 0] >= 0)
        source = np.full(len(found), ANSWER, np.int8)
        return Chains(found, tokens[found], log_p[found], source) if len(found) else NO_CHAINS

    def observe(self, load: StepContext) -> None:
        for slot in load.slots[self._epoch[load.slots] == load.epoch].tolist():
            begin, end = int(self._followed[slot]), int(self._batch.length[slot])
            self._right[slot] = _learn(self._table[slot], self._batch.tokens[slot], begin, end, self._right[slot])
            self._followed[slot] = end

    def _begin(self, load: StepContext) -> None:
        """Give requests that have come into a slot the table of their salt."""
        for slot in load.slots[self._epoch[load.slots] != load.epoch].tolist():
            salt = blake2b(self._batch.blocks.salts[slot]).hexdigest()
            self._table[slot], self._right[slot] = self._table_of(salt), 0
            # Behind a preemption it has more than one token, which were learnt before.
            self._followed[slot] = max(self._batch.prompt_length[slot], self._batch.length[slot] - 1)
        self._epoch[load.slots] = load.epoch

    def _table_of(self, salt: str) -> np.ndarray:
        """Return a salt's table, and let those go that have not been asked for longest."""
        table = self._tables[salt] = self._tables.pop(salt, np.zeros((BUCKETS, WAYS), np.uint64))
        while len(self._tables) > TABLES:
            self._tables.popitem(last=False)
        return table

    def dump(self) -> dict[str, np.ndarray]:
        tables = {}
        for salt in list(self._tables)[-KEPT:]:
            cells = self._tables[salt].ravel()
            used = np.flatnonzero(cells)
            tables[MARK + salt] = np.stack((used.astype(np.uint64), cells[used]))
        return tables

    def load(self, learnt: Mapping[str, np.ndarray]) -> None:
        for name in learnt:
            if name.startswith(MARK):
                cells, table = learnt[name], self._table_of(name.removeprefix(MARK))
                table.ravel()[cells[0].astype(np.int64)] = cells[1]


def answers(networks: Networks, settings: GoodputSettings, acceptance: Acceptance) -> ChainSource | None:
    """Make the source of a bundle; None: its server does not learn answers."""
    return AnswerSource(networks.batch, settings.per_request - 1) if networks.learns_answers else None


# A cell holds the upper half of a context's state, 24 bits of the token behind it, and 8 bits of points.


@compiled("i8(u8)")
def _token(cell: np.uint64) -> int:
    return int(cell >> np.uint64(8) & np.uint64(0xFFFFFF))


@compiled("i8(u8)")
def _points(cell: np.uint64) -> int:
    return int(cell & np.uint64(0xFF))


@compiled("Tuple((i8, i8, u8))(u8[:, ::1], i8[::1])")
def _find(table: np.ndarray, context: np.ndarray) -> tuple[int, int, np.uint64]:
    """Return the bucket of a ``context`` int64 [CONTEXT], its way there, -1 for none, and its key."""
    state = np.uint64(SEED)
    for token in context[::-1]:
        state = longer_by(state, token)
    bucket, key = int(state & np.uint64(len(table) - 1)), state >> np.uint64(32)
    for way in range(WAYS):
        if _points(table[bucket, way]) and table[bucket, way] >> np.uint64(32) == key:
            return bucket, way, key
    return bucket, -1, key


@compiled("i8(u8[:, ::1], i4[::1], i8, i8, i8)")
def _learn(table: np.ndarray, text: np.ndarray, begin: int, end: int, right: int) -> int:
    """Learn tokens ``begin`` to ``end`` of a ``text``. Returns how many in a row the table has had, ``right`` at first.

    A majority vote: another token takes a point from the one that stands there, and its place when none is left. A
    context that is new takes the place of the one with fewest points.
    """
    for i in range(max(begin, CONTEXT), end):
        bucket, way, key = _find(table, text[i - CONTEXT : i].astype(np.int64))
        token, points = int(text[i]), 1
        if way < 0:
            way, right = int((table[bucket] & np.uint64(0xFF)).argmin()), 0
        elif _token(table[bucket, way]) == token:
            right, points = right + 1, min(_points(table[bucket, way]) + 1, POINTS)
        else:
            right = 0
            if _points(table[bucket, way]) > 1:
                token, points = _token(table[bucket, way]), _points(table[bucket, way]) - 1
        table[bucket, way] = key << np.uint64(32) | np.uint64(token) << np.uint64(8) | np.uint64(points)
    return right


@compiled("void(u8[:, ::1], i8[::1], i8, i8[::1], f8[::1])")
def _chain(table: np.ndarray, context: np.ndarray, right: int, tokens: np.ndarray, log_p: np.ndarray) -> None:
    """Write what follows ``context`` int64 [CONTEXT], and its log P(accept): int64 and float64 [L].

    By Laplace's rule of succession, of points beyond the first and of the tokens in a row that were ``right``.
    """
    for level in range(len(tokens)):
        bucket, way, _ = _find(table, context)
        if way < 0:
            return
        known = _points(table[bucket, way]) - 1 + right + level
        tokens[level], log_p[level] = _token(table[bucket, way]), np.log((known + 1) / (known + 2))
        context[:-1] = context[1:]
        context[-1] = tokens[level]
