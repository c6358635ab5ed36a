"""The engine protocol, by which the runtime calls OpenVINO, TensorRT or PyTorch."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from echo_trt.decoding.pack import Packed

#: Inputs of the attention operator that describe a packed call, in its order.
METADATA = ("past_lens", "seq_begins", "block_indices", "block_begins", "tree_mask", "tree_mask_begins")


class Engine(Protocol):
    """A compiled network with its paged KV pool.

    num_blocks  KV blocks of the pool
    sizes       [m], tokens, ascending: a verification is padded to the next size and any pass to the first. Larger
                passes, and all passes of an engine without sizes, are not padded.
    """

    num_blocks: int
    sizes: tuple[int, ...]

    def run(self, call: Packed, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run one forward pass; returns the role's outputs by name, float32 or int64, valid until the next run.

        features  float32 [M, 3 * H_target], of a head (echo_trt.models.eagle3)
        hidden    float32 [P, H], of a head
        state_rows  int64 [N], of a block drafter (echo_trt.models.block): a packed row's state
        """

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy KV rows of all layers. All sources are read before a target is written.

        source, target  int [m], pool rows; row r is in block r // BLOCK at r % BLOCK
        """
