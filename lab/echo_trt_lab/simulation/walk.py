"""Requests that are always running: a slot walks a recorded answer, and takes up another one at its end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from echo_trt.errors import UserError
from echo_trt_lab.calibration.trees import Trees

BEYOND = np.iinfo(np.int64).max  # the token after an answer's end: nothing drafted equals it
_GOLDEN = 0.6180339887498949


class Recording:
    """Recorded trees by place in the answers; ``answers``, int [m], can be walked, in ``seed``'s order."""

    def __init__(self, trees: Trees, seed: int = 0):
        self.trees = trees
        self.lengths = np.diff(trees.answer_begins)
        self.longest = int(self.lengths.max(initial=0))
        inside = np.flatnonzero(trees.left >= 1)
        self._position = np.full(len(trees.answers) + 1, -1)
        self._position[trees.answer_begins[trees.request[inside]] + trees.index[inside]] = inside
        self.answers = np.random.default_rng(seed).permutation(np.flatnonzero(self.lengths >= 2))
        if len(self.answers) == 0:
            raise UserError("the recording has no answer of 2 tokens or more; record more with bench --record.")
        if self.levels == 0:
            raise UserError("the recording has no draft trees; record with a bundle whose draft proposes something.")
        self._check_complete()

    def _check_complete(self) -> None:
        """Refuse a recording that lacks a tree: an iteration may begin after any token but an answer's last."""
        where = np.arange(len(self.trees.answers))
        answer = np.repeat(np.arange(len(self.lengths)), self.lengths)
        index = where - self.trees.answer_begins[answer]
        missing = np.flatnonzero((index >= 1) & (self._position[:-1] < 0))
        if len(missing):
            token, number = index[missing[0]], answer[missing[0]]
            raise UserError(f"the recording lacks the tree after token {token} of answer {number}; record it again.")

    def position(self, answer: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the position, int [m], whose tree continues answer[: index]; ``answer``, ``index`` int [m]."""
        return self._position[self.trees.answer_begins[answer] + index]

    @cached_property
    def levels(self) -> int:
        return int(self.trees.depth.max(initial=0))

    @cached_property
    def width(self) -> int:
        """The largest number of children of one node."""
        return int(max(self.trees.first_child[1].max(initial=0), self.trees.root_children.max(initial=0)))

    @cached_property
    def beams(self) -> int:
        """The largest number of expanded nodes in one level."""
        trees = self.trees
        position = np.repeat(np.arange(len(trees)), np.diff(trees.node_begins))
        expanded = trees.first_child[1] > 0
        level = position[expanded] * (self.levels + 1) + trees.depth[expanded]
        return max(int(np.bincount(level, minlength=1).max()), 1)


@dataclass(frozen=True)
class Kept:
    """An iteration's commit: ``tokens`` of the running slots, int [B], and slots whose answers ``ended``, int [m].

    ``answers`` are those that the slots walked, int [B].
    """

    tokens: np.ndarray
    ended: np.ndarray
    answers: np.ndarray


class Walk:
    """``batch`` slots that walk recorded answers, with ``prompt`` cached tokens before every answer.

    running    int64 [B], slots of this iteration's requests, here all S of them
    answer     int [S], a slot's answer
    index      int [S], tokens of the answer so far
    prompt     int [S], cached tokens before the answer
    draft_lag  int64 [S], entries that the slot's draft has to catch up
    epoch      int [S], number of the slot's admission
    Slots begin spread over their answers. With more slots than answers several walk one, from different places.
    """

    def __init__(self, recording: Recording, batch: int, prompt: int):
        self.recording, self.batch = recording, batch
        self.running, self.prompt = np.arange(batch), np.full(batch, prompt)
        self._admissions = 0
        self.restart()

    def restart(self) -> None:
        """Begin again with the first requests; a planner sees them as new ones."""
        recording, batch = self.recording, self.batch
        self.answer = recording.answers[np.arange(batch) % len(recording.answers)]
        share = (np.arange(1, batch + 1) * _GOLDEN) % 1
        self.index = 1 + (share * (recording.lengths[self.answer] - 1)).astype(np.int64)
        self.draft_lag = np.ones(batch, np.int64)
        self.epoch = self._admissions + np.arange(batch)
        self._admissions += batch
        self._next = batch

    @property
    def positions(self) -> np.ndarray:
        return self.positions_of(self.running)

    def positions_of(self, slots: np.ndarray) -> np.ndarray:
        return self.recording.position(self.answer[slots], self.index[slots])

    @property
    def left(self) -> np.ndarray:
        """Tokens that a running slot's answer still has, 1 or more: int [B]."""
        return self.recording.lengths[self.answer[self.running]] - self.index[self.running]

    @property
    def max_draft_len(self) -> np.ndarray:
        """Draft tokens in a row that a slot may still use: int [B]. The limit counts, as an answer's end is unknown."""
        return self.recording.longest - self.index[self.running] - 1

    @property
    def roots(self) -> np.ndarray:
        """The newest tokens of the slots: int64 [B]."""
        return self.recent(1, 0)[:, 0]

    def recent(self, count: int, before: int = 1) -> np.ndarray:
        """Return ``count`` tokens up to ``before`` ahead of a slot's newest, -1 before the answer: int64 [B, count]."""
        where = self.index[self.running][:, None] - before - np.arange(count, 0, -1)
        begin = self.recording.trees.answer_begins[self.answer[self.running]]
        tokens = self.recording.trees.answers[begin[:, None] + np.maximum(where, 0)]
        return np.where(where >= 0, tokens, -1).astype(np.int64)

    @property
    def context(self) -> np.ndarray:
        """Tokens of a running slot in the cache, all but the newest: int [B]."""
        return self.index[self.running] + self.prompt[self.running] - 1

    def advance(self, counts: np.ndarray) -> Kept:
        """Emit ``counts``, int [B], tokens of the running slots; tokens beyond an answer's end are dropped."""
        kept, answers = np.minimum(counts, self.left), self.answer[self.running]
        self.index[self.running] += kept
        self.draft_lag[self.running] += kept
        ended = self.running[self.left == 0]
        for slot in ended:
            self._end(int(slot))
        return Kept(kept, ended, answers)

    def _end(self, slot: int) -> None:
        """Take up another answer."""
        self._begin(slot, int(self.prompt[slot]))

    def _begin(self, slot: int, prompt: int) -> None:
        """Begin the next answer, whose first token is there, behind a prompt."""
        self.answer[slot] = self.recording.answers[self._next % len(self.recording.answers)]
        self.prompt[slot] = prompt
        self.index[slot], self.draft_lag[slot] = 1, prompt + 1  # a draft begins with the prompt
        self.epoch[slot] = self._admissions
        self._admissions += 1
        self._next += 1
