"""Recorded draft trees and the target's answers: the data behind calibration and simulation.

At every position of an answer the draft grows a full tree, ungated, and plain decoding goes on by one token. A replay
can therefore begin an iteration at any position, with any policy whose levels, beams and width were recorded.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.drafters.lookup import LookupDrafter
from echo_trt.errors import DAMAGED, UserError
from echo_trt.speculation.arrays import begins, ragged_arange
from echo_trt.speculation.drafts import ROOT, Draft, KnownTrees
from echo_trt.speculation.echo.grow import grow
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.planner import Plan, Planner, StepContext
from echo_trt.speculation.super_tree import SuperTree

COPIED = 8  # tokens of a continuation that are recorded; larger: longer copies can be replayed, larger files


@dataclass(frozen=True)
class Trees:
    """P positions in the answers of R requests, with n tree nodes without roots.

    answers        int32 [tokens], answers end to end
    answer_begins  int [R + 1], where a request's answer begins
    group          int [R], index in ``groups``
    groups         str [sets], names of data sets
    request        int [P], a position's request
    index          int [P], answer tokens before the position: its tree continues answer[: index]
    node_begins    int [P + 1], where a position's nodes begin
    parent         int [n], index among the position's nodes, -1 for the root
    token          int [n]
    depth          int [n], 1 below the root
    log_q          float32 [n], log-probability of the token given its path
    copied         int32 [P, COPIED], continuation from the text, -1 after its end
    matched        int [P], tokens that matched before the continuation
    """

    answers: np.ndarray
    answer_begins: np.ndarray
    group: np.ndarray
    groups: np.ndarray
    request: np.ndarray
    index: np.ndarray
    node_begins: np.ndarray
    parent: np.ndarray
    token: np.ndarray
    depth: np.ndarray
    log_q: np.ndarray
    copied: np.ndarray
    matched: np.ndarray

    def __len__(self) -> int:
        return len(self.request)

    @cached_property
    def left(self) -> np.ndarray:
        """Tokens of the answer after a position: int [P]."""
        return np.diff(self.answer_begins)[self.request] - self.index

    @cached_property
    def first_child(self) -> tuple[np.ndarray, np.ndarray]:
        """A node's first child and number of children: int64 [n] both."""
        count = len(self.parent)
        parent = np.repeat(self.node_begins[:-1], np.diff(self.node_begins)) + self.parent
        children = np.flatnonzero(self.parent >= 0)
        first = np.zeros(count, np.int64)
        first[parent[children][::-1]] = children[::-1]  # siblings are adjacent, and the first one is written last
        return first, np.bincount(parent[children], minlength=count)

    @cached_property
    def root_children(self) -> np.ndarray:
        """Number of a position's nodes of depth 1, which stand first: int [P]."""
        position = np.repeat(np.arange(len(self)), np.diff(self.node_begins))
        return np.bincount(position[self.depth == 1], minlength=len(self))

    def truth(self, positions: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        """Look up the answers' tokens, int [m], -1 after an answer's end.

        positions  int [m]
        ahead      int [m], 1 for the next token
        """
        inside = ahead <= self.left[positions]
        index = self.answer_begins[self.request[positions]] + self.index[positions] + ahead - 1
        return np.where(inside, self.answers[np.minimum(index, len(self.answers) - 1)], -1)

    def _is_whole(self) -> bool:
        """Return whether the arrays fit each other: indices are valid, and parents stand before their children."""
        tokens, requests, count, nodes = map(len, (self.answers, self.group, self.request, self.parent))
        shapes = {
            **{"answers": (tokens,), "answer_begins": (requests + 1,), "node_begins": (count + 1,)},
            **{"group": (requests,), "copied": (count, COPIED)},
            **dict.fromkeys(("request", "index", "matched"), (count,)),
            **dict.fromkeys(("parent", "token", "depth", "log_q"), (nodes,)),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype.kind != ("f" if name == "log_q" else "i"):
                return False
        for begin, total in ((self.answer_begins, tokens), (self.node_begins, nodes)):
            if begin[0] != 0 or begin[-1] != total or (np.diff(begin) < 0).any():
                return False
        index = ragged_arange(np.diff(self.node_begins))
        inside = (
            (self.group >= 0) & (self.group < len(self.groups)),
            (self.request >= 0) & (self.request < requests),
            (self.parent >= ROOT) & (self.parent < index),
            self.index >= 0,
            self.matched >= 0,
            np.isfinite(self.log_q),
        )
        if not all(check.all() for check in inside):
            return False
        above = np.where(self.parent >= 0, self.depth[np.arange(nodes) - index + self.parent], 0)
        return bool((self.depth == above + 1).all() and (self.left >= 0).all())

    def to_bytes(self) -> bytes:
        stream = io.BytesIO()
        np.savez_compressed(stream, **asdict(self))
        return stream.getvalue()

    @classmethod
    def read(cls, path: Path) -> Trees:
        try:
            with np.load(path, allow_pickle=False) as stored:
                trees = cls(**{name: stored[name] for name in cls.__dataclass_fields__})
            if not trees._is_whole():
                raise ValueError("its arrays do not fit each other")
            return trees
        except OSError as error:
            reason = error.strerror or "not readable"
            raise UserError(f"recording {path} cannot be read ({reason}); name one of bench --record.") from error
        except DAMAGED as error:
            raise UserError(f"{path} is not a recording; name a file that bench --record wrote.") from error


class TreeRecorder(Planner):
    """A planner that records every tree, and has only the roots verified."""

    name, budget = "record", 0

    def __init__(self, batch: InputBatch, shape: EchoSettings, copier: LookupDrafter | None = None, head: bool = True):
        """Record trees of ``shape``'s max_depth, beams and width; without a ``head`` only ``copier`` proposes."""
        self._batch, self._shape, self._copier, self._head = batch, shape, copier, head
        self._parts: list[dict[str, np.ndarray]] = []

    def plan(self, roots: np.ndarray, draft: Draft, load: StepContext) -> Plan:
        batch, count = self._batch, len(roots)
        tokens, matched = np.full((count, COPIED), -1), np.zeros(count, np.int64)
        if self._copier:
            tokens, matched = self._copier.matches(load.slots, COPIED)
        tree = SuperTree.from_roots(roots)
        if self._head and load.max_draft_len.any():
            tree, _ = grow(roots, draft, self._shape, load.max_draft_len)
        nodes = np.flatnonzero(tree.parent >= 0)
        nodes = nodes[np.argsort(tree.request[nodes], kind="stable")]
        sizes = np.bincount(tree.request[nodes], minlength=count)
        local = np.full(len(tree), -1)
        local[nodes] = ragged_arange(sizes)
        parent = tree.parent[nodes]
        self._parts.append(
            {
                "epoch": load.epoch,
                "index": batch.length[load.slots] - batch.prompt_length[load.slots],
                "sizes": sizes,
                "parent": local[parent],
                "token": tree.token[nodes],
                "depth": tree.depth[nodes],
                "log_q": tree.score[nodes] - tree.score[parent],
                "copied": tokens,
                "matched": matched,
            }
        )
        return Plan.undrafted(roots)

    def trees(self, serials: np.ndarray, answers: list[list[int]], groups: list[str]) -> Trees:
        """Put the recorded trees of some requests and their answers together; ``serials``, int [R], of admission."""
        column = {name: np.concatenate([p[name] for p in self._parts]) for name in self._parts[0]}
        request = np.searchsorted(serials, column["epoch"])
        names, group = np.unique(groups, return_inverse=True)
        lengths = np.array([len(a) for a in answers])
        return Trees(
            answers=np.concatenate([np.asarray(a, np.int32) for a in answers]),
            answer_begins=begins(lengths),
            group=group,
            groups=names,
            request=request,
            index=column["index"],
            node_begins=begins(column["sizes"]),
            parent=column["parent"].astype(np.int16),
            token=column["token"].astype(np.int32),
            depth=column["depth"].astype(np.int8),
            log_q=column["log_q"].astype(np.float32),
            copied=column["copied"].astype(np.int32),
            matched=column["matched"].astype(np.int16),
        )


class RecordedDraft(KnownTrees):
    """A draft that reads recorded trees: request i of the batch is at ``positions[i]``."""

    def __init__(self, trees: Trees, positions: np.ndarray, width: int | None = None):
        """``width``: children of a node that are read, at most; None: all."""
        first, count = trees.first_child
        roots = trees.node_begins[positions], trees.root_children[positions]
        if width is not None:
            count, roots = np.minimum(count, width), (roots[0], np.minimum(roots[1], width))
        super().__init__(trees.token, trees.log_q, first, count, roots)
