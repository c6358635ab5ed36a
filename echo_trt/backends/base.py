"""The engine protocol: what the runtime asks of OpenVINO, TensorRT or PyTorch."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from echo_trt.decoding.pack import Packed


class Engine(Protocol):
    """A compiled network with its paged KV pool."""

    num_blocks: int
    sizes: tuple[int, ...]
    """Ascending pass sizes in tokens. A verification is padded to the next size, any other pass to at least the first.
    Empty: no padding."""

    def run(self, call: Packed, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """One forward pass. ``inputs`` are a head's ``features`` and ``hidden``, float32.

        Returns the role's outputs by name (echo_trt.models.roles), float32 or int64, valid until the next run.
        """

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy KV rows of all layers, pool row source[j] to target[j] (both [m]); row r is block r // BLOCK, r % BLOCK.

        All sources are read before a target is written.
        """
