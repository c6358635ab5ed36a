"""The engine protocol, by which the runtime calls OpenVINO, TensorRT, PyTorch or ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from echo_trt.speculation.pack import ForwardBatch

#: The domain of our operators in ONNX, the attention's name and the collectives'.
DOMAIN, OPERATOR, COLLECTIVES = "echo", "SuperTreeAttention", ("AllReduce", "AllGather")
#: Whether the process ends by ``os._exit``, without the destructors of libraries; to be set before an engine is opened.
ends_at_once = False
#: Inputs of the attention operator that describe a packed call, in its order.
METADATA = ("past_lens", "seq_begins", "block_indices", "block_begins", "tree_mask", "tree_mask_begins")


class FeatureCache(Protocol):
    """Rows [count, width] that outlive a call, as later calls' inputs."""

    def write(self, handles: np.ndarray, outputs: Any, rows: np.ndarray) -> None:
        """Keep ``outputs[rows]``, of an engine's run, rows int64 [m], at ``handles`` int64 [m]."""

    def read(self, handles: np.ndarray) -> Any:
        """Return rows ``handles`` int64 [m], as an input of ``Engine.run``."""


class HostFeatureCache:
    """A feature cache in the host's memory, which is taken as rows are written."""

    def __init__(self, count: int, width: int):
        self._rows = np.zeros((count, width), np.float32)  # calloc: only pages that are used take memory

    def write(self, handles: np.ndarray, outputs: Any, rows: np.ndarray) -> None:
        self._rows[handles] = outputs[rows]

    def read(self, handles: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._rows[handles]
        return found


def overlap(engine: Engine, work: Callable[[], None]) -> bool:
    """Let ``engine`` call ``work`` in every run, while the device computes; False where it computes on the host."""
    offered: Callable[[Callable[[], None]], bool] = getattr(engine, "overlap", lambda work: False)
    return offered(work)


def commit_states(engine: Engine, rows: np.ndarray, counts: np.ndarray) -> None:
    """Advance the states of ``engine``, if it has any, over the packed rows of its last run that were accepted.

    rows    int64 [sum counts], packed rows of the run, request by request, each request's in path order
    counts  int64 [B], of the run's requests; 0: the request's states stay as they are
    """
    commit = getattr(engine, "commit_states", None)
    if commit is not None:
        commit(rows, counts)


def feature_cache_of(engine: Engine, name: str, count: int, width: int) -> FeatureCache:
    """Return the feature cache of the input ``name``: the engine's own, on its device, or one on the host."""
    own = getattr(engine, "feature_cache", lambda name: None)(name)
    return own or HostFeatureCache(count, width)


class Engine(Protocol):
    """A compiled network with its paged KV pool.

    An engine on a device may also have ``feature_cache`` (``feature_cache_of``), ``overlap``, ``prefill_alone`` (prompt
    tokens of a call without other work, if more than a chunk) and, of an EAGLE-3 head, ``run_levels``
    (``backends.cuda.engine.DeviceEngine``). A network with states beside its KV rows has a slot of them for each
    request (``ForwardBatch.state_slots``): a run reads them and starts from zero where a request has no past, and
    ``commit_states`` advances them, which must follow before the slot's next run. An engine whose verified chains have
    the bits of plain decoding, and whose trees do not, sets ``rounds_trees``. One whose trees are exact only up to so
    many tokens of a request, the tree's among them, sets ``tree_context``; beyond it a tree must be one path.

    num_blocks  KV blocks of the pool
    sizes       [m], tokens, ascending: a verification is padded to the next size and any pass to the first. Larger
                passes, and all passes of an engine without sizes, are not padded.
    """

    num_blocks: int
    sizes: tuple[int, ...]

    def run(self, call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run one forward pass over N packed rows and compute the logits of R logit rows.

        Inputs beside ``call``, by the kind of network:
        features    float32 [M, 3 * H_target], of a head (echo_trt.models.eagle3), or what its feature cache reads
        hidden      float32 [P, H], of a head, or what its feature cache reads
        state_rows  int64 [N], of a block drafter (echo_trt.models.block): a packed row's state

        Returns outputs by name, valid until the next run; a device's large ones are read like arrays, row by row:
        logits      float32 [R, V], of a target or a draft model
        features    float32 [N, 3 * H], of a target whose draft is a head
        scores      float32 [R, k], of a draft: log-probabilities of the best next tokens, best first
        candidates  int64 [R, k], of a draft: those tokens
        state       float32 [N, H], of a head: input ``hidden`` of later passes
        hints       float32 [R, G], of a block drafter with a Markov or confidence head
        """

    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy KV rows of all layers. All sources are read before a target is written.

        source, target  int [m], pool rows; row r is in block r // BLOCK at r % BLOCK
        """
