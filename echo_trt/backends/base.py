"""The engine protocol, by which the runtime calls the engines ``cpu``, ``openvino``, ``tensorrt`` and ``torch``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from echo_trt.speculation.pack import ForwardBatch
from echo_trt.speculation.planner import Plan

#: The domain of our operators in ONNX, the attention's name and the collectives'.
DOMAIN, OPERATOR, COLLECTIVES = "echo", "SuperTreeAttention", ("AllReduce", "AllGather")
#: Inputs of the attention operator that describe a packed call, in its order.
METADATA = ("past_lens", "seq_begins", "block_indices", "block_begins", "tree_mask", "tree_mask_begins")
#: Outputs with a row for every token; other outputs have one for every row of ``logit_rows``.
ROW_OUTPUTS = ("features", "state")


class FeatureCache(Protocol):
    """Rows [count, width] that outlive a call, as later calls' inputs."""

    def write(self, handles: np.ndarray, outputs: Any, rows: np.ndarray) -> None:
        """Keep ``outputs[rows]``, of an engine's run, rows int64 [m], at ``handles`` int64 [m]."""

    def read(self, handles: np.ndarray) -> Any:
        """Return rows ``handles`` int64 [m], as an input of ``Engine.run``."""


class HostFeatureCache:
    """A feature cache in the host's memory, which is taken as rows are written."""

    def __init__(self, count: int, width: int):
        self.rows = np.zeros((count, width), np.float32)  # calloc: only pages that are used take memory

    def write(self, handles: np.ndarray, outputs: Any, rows: np.ndarray) -> None:
        self.rows[handles] = outputs[rows]

    def read(self, handles: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.rows[handles]
        return found


class Engine(Protocol):
    """A compiled network with its paged KV pool. What has a default here, an engine may leave out.

    num_blocks     KV blocks of the pool
    sizes          [m], tokens, ascending: a verification is padded to the next size and any pass to the first. Larger
                   passes, and all passes of an engine without sizes, are not padded.
    prefill_alone  prompt tokens of a call without other work, if more than a chunk
    rounds_trees   whether verified chains have the bits of plain decoding, and trees do not
    widths         columns of inputs and outputs with one row per token, by name, where the file tells them
    paged          whether KV blocks hold all that it keeps of a request; else no cache finds any of it again, and slots
                   cannot be divided among loops
    longest        tokens of a request in one pass, at most
    """

    num_blocks: int
    sizes: tuple[int, ...]
    prefill_alone: int = 0
    rounds_trees: bool = False
    paged: bool = True
    longest: int = 2**31
    widths: Mapping[str, int] = MappingProxyType({})

    def run(self, call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run one forward pass over N packed rows and compute the logits of R logit rows.

        Inputs beside ``call``, by the kind of network:
        features    float32 [M, F], ``draft.feature_size`` of a manifest, or what the feature cache reads
        hidden      float32 [P, H], of a head, or what its feature cache reads
        state_rows  int64 [N], of a block drafter (echo_trt.models.block): a packed row's state

        Returns outputs by name, valid until the next run; a device's large ones are read like arrays, row by row:
        logits      float32 [R, V], of a target or a draft model
        features    float32 [N, F], of a target whose draft reads them
        scores      float32 [R, k], of a draft: log-probabilities of the best next tokens, best first
        candidates  int64 [R, k], of a draft: those tokens
        state       float32 [N, H], of a head: input ``hidden`` of later passes
        confidence  float32 [R, 1], of a block drafter with a confidence head: its logit, without the token's part
        """

    def launch(self, call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run a call, without waiting for a device that has yet to compute logits: whoever reads them does."""
        return self.run(call, **inputs)

    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy KV rows of all layers. All sources are read before a target is written.

        source, target  int [m], pool rows; row r is in block r // BLOCK at r % BLOCK
        """

    def kv_block(self, index: int) -> Sequence[np.ndarray]:
        """Return views of all that a KV block holds, of all layers; none where the host cannot reach it."""
        return ()

    def commit(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Keep what is not in KV blocks of the accepted packed rows of the last run, before a slot's next run.

        rows    int64 [sum counts], packed rows, request by request, each request's in path order
        counts  int64 [B], of the run's requests; 0: the request stays as it is
        """
        return

    def exact(self, plan: Plan, past: np.ndarray) -> Plan:
        """Return the part of ``plan`` that a run verifies exactly, behind ``past`` int64 [B] cached tokens."""
        return plan

    def overlap(self, work: Callable[[], None]) -> bool:
        """Call ``work`` in every run, while the device computes; False where the engine computes on the host."""
        return False

    def feature_cache(self, name: str) -> FeatureCache | None:
        """Return the feature cache of the input ``name`` on the engine's device; None: it belongs on the host."""
        return None

    @property
    def drafts_levels(self) -> bool:
        """Whether this is a head that can draft several levels (``backends.cuda.engine.DeviceEngine``)."""
        return False
