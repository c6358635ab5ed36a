"""Draft trees as they were drafted, and what the target then wrote: the data behind calibration and simulation.

At each position of each answer the draft grows a full tree, ungated, and plain decoding goes on by one token. So a
replay can begin an iteration at any position, with any policy whose levels, beams and width stay within the recorded.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from echo_trt.decoding.arrays import begins, ragged_arange
from echo_trt.decoding.echo.grow import grow
from echo_trt.decoding.echo.settings import EchoSettings
from echo_trt.decoding.planner import Copier, Draft, Iteration, Load, Plan
from echo_trt.decoding.super_tree import SuperTree
from echo_trt.errors import DAMAGED, UserError
from echo_trt.runtime.slots import Slots

COPIED = 8  # tokens of a continuation that are kept
ROOT, UNKNOWN = -1, -2  # for an index of a recorded node


@dataclass(frozen=True)
class Trees:
    """P positions of R answers. A position's nodes are [node_begins[p], node_begins[p + 1]), its root not among them.

    answers int32, end to end, of R requests with ``answer_begins`` [R + 1]; group [R]: which of ``groups`` (data sets)
    a request is of. request, index [P]: the position's tree continues answer[: index]. parent [n]: among the position's
    nodes, -1 the root; token, depth [n]; log_q float32 [n]: of the token given its path. copied int32 [P, COPIED],
    -1 where there is none; matched [P]: on how many tokens the continuation was found.
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
        """Tokens of the answer after each position [P]."""
        return np.diff(self.answer_begins)[self.request] - self.index

    @cached_property
    def first_child(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each node: where its children begin, and how many they are. int64 [n], [n]"""
        count = len(self.parent)
        parent = np.repeat(self.node_begins[:-1], np.diff(self.node_begins)) + self.parent
        children = np.flatnonzero(self.parent >= 0)
        first = np.zeros(count, np.int64)
        first[parent[children][::-1]] = children[::-1]  # siblings stand together: the last written is the first of them
        return first, np.bincount(parent[children], minlength=count)

    @cached_property
    def root_children(self) -> np.ndarray:
        """Nodes of depth 1 of each position [P]; they stand first."""
        position = np.repeat(np.arange(len(self)), np.diff(self.node_begins))
        return np.bincount(position[self.depth == 1], minlength=len(self))

    def truth(self, positions: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        """The answers' tokens ``ahead`` (1: the next) of ``positions``, both [m]; -1 after an answer's end."""
        inside = ahead <= self.left[positions]
        place = self.answer_begins[self.request[positions]] + self.index[positions] + ahead - 1
        return np.where(inside, self.answers[np.minimum(place, len(self.answers) - 1)], -1)

    def _is_whole(self) -> bool:
        """Whether the arrays fit each other: no index leads out of them, and parents stand before their children."""
        tokens, requests, count, nodes = map(len, (self.answers, self.group, self.request, self.parent))
        shapes = {
            **{"answers": (tokens,), "answer_begins": (requests + 1,), "node_begins": (count + 1,)},
            **{"group": (requests,), "copied": (count, COPIED)},
            **dict.fromkeys(("request", "index", "matched"), (count,)),
            **dict.fromkeys(("parent", "token", "depth", "log_q"), (nodes,)),
        }
        arrays = {name: getattr(self, name) for name in shapes}
        if any(
            a.shape != shapes[name] or a.dtype.kind != ("f" if name == "log_q" else "i") for name, a in arrays.items()
        ):
            return False
        for begin, total in ((self.answer_begins, tokens), (self.node_begins, nodes)):
            if begin[0] != 0 or begin[-1] != total or (np.diff(begin) < 0).any():
                return False
        place = ragged_arange(np.diff(self.node_begins))
        inside = (
            (self.group >= 0) & (self.group < len(self.groups)),
            (self.request >= 0) & (self.request < requests),
            (self.parent >= ROOT) & (self.parent < place),
            self.index >= 0,
            self.matched >= 0,
            np.isfinite(self.log_q),
        )
        if not all(each.all() for each in inside):
            return False
        above = np.where(self.parent >= 0, self.depth[np.arange(nodes) - place + self.parent], 0)
        return bool((self.depth == above + 1).all() and (self.left >= 0).all())

    def write(self, path: Path) -> None:
        path.write_bytes(self.to_bytes())

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


class TreeRecorder:
    """A planner that keeps every tree, and has only the roots verified."""

    name, budget = "record", 0

    def __init__(self, state: Slots, shape: EchoSettings, copier: Copier | None = None, head: bool = True):
        """``shape``: max_depth, beams and width of the recorded trees; without a ``head`` only ``copier`` proposes."""
        self._state, self._shape, self._copier, self._head = state, shape, copier, head
        self._parts: list[dict[str, np.ndarray]] = []

    def observe(self, iteration: Iteration) -> None:
        pass

    def totals(self) -> dict[str, dict[str, float]]:
        return {}

    def plan(self, roots: np.ndarray, draft: Draft, load: Load) -> Plan:
        state, count = self._state, len(roots)
        copied = self._copier.continuations(load.slots, COPIED) if self._copier else None
        tree = SuperTree.from_roots(roots)
        if self._head and load.room.any():
            tree, _ = grow(roots, draft, self._shape, load.room)
        nodes = np.flatnonzero(tree.parent >= 0)
        nodes = nodes[np.argsort(tree.request[nodes], kind="stable")]
        sizes = np.bincount(tree.request[nodes], minlength=count)
        local = np.full(len(tree), -1)
        local[nodes] = ragged_arange(sizes)
        parent = tree.parent[nodes]
        tokens = np.full((count, COPIED), -1) if copied is None else copied.tokens[:, :COPIED]
        self._parts.append(
            {
                "serial": load.serial,
                "index": state.length[load.slots] - state.prompt_length[load.slots],
                "sizes": sizes,
                "parent": local[parent],
                "token": tree.token[nodes],
                "depth": tree.depth[nodes],
                "log_q": tree.score[nodes] - tree.score[parent],
                "copied": np.pad(tokens, ((0, 0), (0, COPIED - tokens.shape[1])), constant_values=-1),
                "matched": np.zeros(count, int) if copied is None else copied.matched,
            }
        )
        return Plan.undrafted(roots)

    def trees(self, serials: np.ndarray, answers: list[list[int]], groups: list[str]) -> Trees:
        """What was recorded for the requests with these admission ``serials`` [R], whose answers are now known."""
        column = {name: np.concatenate([p[name] for p in self._parts]) for name in self._parts[0]}
        request = np.searchsorted(serials, column["serial"])
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


class RecordedDraft:
    """A drafter's iteration that reads recorded trees: request i of the batch stands at ``positions[i]``."""

    def __init__(self, trees: Trees, positions: np.ndarray, width: int):
        self.entries = self.context = 0
        self._trees, self._positions, self._places = trees, positions, np.arange(width)
        self._recorded = np.full(len(positions), ROOT)  # of each node of the super-tree that was expanded

    def expand_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.entries = len(requests)
        return self._children(requests, np.full(len(requests), ROOT))[:2]

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.entries = len(nodes)
        unknown = np.full(len(tree) - len(self._recorded), UNKNOWN)
        self._recorded = np.concatenate((self._recorded, unknown))
        _, tokens, index = self._children(tree.request[nodes], self._recorded[tree.parent[nodes]])
        same = (tokens == tree.token[nodes][:, None]) & (index >= 0)
        found = np.where(same.any(axis=1), index[np.arange(len(nodes)), same.argmax(axis=1)], UNKNOWN)
        self._recorded[nodes] = found
        return self._children(tree.request[nodes], found)[:2]

    def _children(self, requests: np.ndarray, recorded: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log q, tokens and indices [m, width] of what was recorded under ``recorded`` nodes; -inf where nothing."""
        trees, position = self._trees, self._positions[requests]
        first, count = trees.first_child
        node, at_root = np.maximum(recorded, 0), recorded == ROOT
        begin = np.where(at_root, trees.node_begins[position], first[node])
        size = np.where(at_root, trees.root_children[position], count[node])
        size[recorded == UNKNOWN] = 0
        inside = self._places < size[:, None]
        index = np.where(inside, begin[:, None] + self._places, 0)
        log_q = np.where(inside, trees.log_q[index], -np.inf)
        return log_q, trees.token[index].astype(np.int64), np.where(inside, index, UNKNOWN)
