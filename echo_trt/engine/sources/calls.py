"""The source of tool calls: what stands between the arguments, as soon as a text begins to call a declared tool.

A request's skeleton holds the calls of its tools, one after another: tokens of a call up to its first value, HOLE,
those up to the next value, ..., and END behind the last ones. Declarations tell all of a call but the values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echo_trt.engine.assemble import Networks
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.sources.predictions import FollowingSource
from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import ChainSource, StepContext
from echo_trt.speculation.sources import CALL

HOLE, END = -1, -2
STATE, LONGEST = 4, 24  # tokens of a chain; larger: rarely a longer one
ENDS = 0.3  # P(a value of one token or more has ended) before anything is learnt; larger: more tokens behind values
POSITION, BEGIN, VALUE, AGREES = range(STATE)  # index of the next token, that of its part; tokens in a value, matched


class CallSource(FollowingSource):
    """Proposes what follows in a request's skeleton up to the next value, where its text stands in a call.

    After k tokens in a row that agree, the next is right with probability (k + 1) / (k + 2), shared by the tools whose
    calls have begun alike.
    """

    def __init__(self, batch: InputBatch):
        super().__init__(batch, "calls", CALL, STATE, LONGEST, _follow, _chain)

    def forces(self, load: StepContext) -> bool:
        slots = load.slots[self._known.has[load.slots] & (load.max_draft_len > 0)]
        return any(state[POSITION] > state[BEGIN] for state in map(self._stand, slots.tolist()))


def skeleton(tools: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """Return the skeleton of calls, int64 [n], from the tokens of each tool's call between its values."""
    ids = [token for parts in tools for part in parts for token in (*part, HOLE if part is not parts[-1] else END)]
    return np.array(ids, np.int64)


def calls(networks: Networks, settings: GoodputSettings, acceptance: Acceptance) -> ChainSource:
    """Make the source of a bundle."""
    return CallSource(networks.batch)


@compiled("b1(i8[::1], i8, i8, i8)")
def _alike(skeleton: np.ndarray, one: int, other: int, count: int) -> bool:
    """Say whether parts that begin at ``one`` and ``other`` have the same ``count`` tokens first."""
    level = 0
    while level < count and skeleton[one + level] == skeleton[other + level]:  # they differ before either ends
        level += 1
    return level == count


@compiled("i8(i8[::1], i8, b1)")
def _next(skeleton: np.ndarray, part: int, inside: bool) -> int:
    """Return where the next part of the same call begins or, unless ``inside``, the next call; -1: nowhere."""
    while skeleton[part] != END and not (inside and skeleton[part] == HOLE):
        part += 1
    if skeleton[part] == HOLE or (not inside and part + 1 < len(skeleton)):
        return part + 1
    return -1


@compiled("i8(i8[::1], i8, i8, i8, b1)")
def _find(skeleton: np.ndarray, begin: int, count: int, token: int, inside: bool) -> int:
    """Return the first part from ``begin`` on that has the same ``count`` tokens first, and ``token`` behind; or -1."""
    part = begin
    while part >= 0 and not (_alike(skeleton, begin, part, count) and skeleton[part + count] == token):
        part = _next(skeleton, part, inside)
    return part


@compiled("void(i8[::1], i4[::1], i8, i8, i8, i8[::1])")
def _follow(skeleton: np.ndarray, text: np.ndarray, first: int, begin: int, end: int, state: np.ndarray) -> None:
    """Follow tokens ``begin`` to ``end`` of a ``text``. Where it is in no call, the next token begins the first part.

    An argument may be left out, and a value may hold what ends others.
    """
    for token in text[begin:end]:
        position, part = state[POSITION], state[BEGIN]
        inside = part > 0 and skeleton[part - 1] == HOLE
        found = _find(skeleton, part, position - part, token, inside)
        if found < 0 and position > part:  # no end of the value, or no call: from the beginning
            state[VALUE] += position - part
            part = position = part if inside else 0
            found = _find(skeleton, part, 0, token, inside)
        if found < 0:
            state[POSITION], state[BEGIN], state[AGREES] = part, part, state[AGREES] if inside else 0
            state[VALUE] += 1
            continue
        position += found - part + 1
        state[BEGIN] = found
        state[AGREES] += 1
        if skeleton[position] == HOLE:
            position += 1
            state[BEGIN], state[VALUE] = position, 0
        elif skeleton[position] == END:
            position = state[BEGIN] = state[AGREES] = 0
        state[POSITION] = position


@compiled("void(i8[::1], i8[::1], i8[::1], f8[::1])")
def _chain(skeleton: np.ndarray, state: np.ndarray, tokens: np.ndarray, log_p: np.ndarray) -> None:
    """Write the next tokens, and their log P(accept), into ``tokens`` int64 [L] and ``log_p`` float64 [L]."""
    position, begin = state[POSITION], state[BEGIN]
    inside = begin > 0 and skeleton[begin - 1] == HOLE
    if position == begin and not (inside and state[VALUE]):
        return
    chance = ENDS if position == begin else 1.0
    for level in range(len(tokens)):
        token, count = skeleton[position + level], position + level - begin
        if token < 0:
            return
        alike = same = 0.0
        part = -1 if inside else 0
        while part >= 0:  # calls that have begun alike, and those that go on alike
            if _alike(skeleton, begin, part, count):
                alike += 1.0
                same += skeleton[part + count] == token
            part = _next(skeleton, part, False)
        known = state[AGREES] + level
        chance *= (same / alike if alike else 1.0) * (known + 1) / (known + 2)
        tokens[level], log_p[level], chance = token, np.log(chance), 1.0
