"""Optimisation profiles: the sizes of calls for which an engine is made, in decoding and for prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from echo_trt.backends.cuda.sizes import LARGEST, bucket
from echo_trt.backends.tensorrt.compiler import Profile
from echo_trt.bundle.call_sizes import CallSizes

Range = tuple[int, int, int]  # least, usual and largest size of an axis


def packed_profiles(graph: Path, sizes: CallSizes) -> list[Profile]:
    """Make the profiles of the graph that prepare_graph writes: up to 32 tokens, up to 256, and more."""
    batch, maximum = bucket(sizes.batch), max(sizes.rows, sizes.chunk) + sizes.chunk
    maximum = max(maximum, bucket(min(maximum, LARGEST)))  # calls beyond LARGEST are not padded
    profiles = []
    for minimum, largest in ((1, 32), (33, 256), (257, maximum)):
        if minimum > maximum:
            break
        largest = min(largest, maximum)
        requests = min(batch, largest)
        axes: dict[str, Range] = {
            "tokens": (minimum, largest, largest),
            "rows": (1, min(largest, sizes.rows), largest),
            # A head computes M features and P hidden states, M + P tokens: usual sizes that break this are refused.
            "feature_rows": (0, largest, largest),
            "hidden_rows": (0, 0, largest),
            "batch": (1, requests, requests),
            "batch + 1": (2, requests + 1, requests + 1),
            # Also more than the pool's, since requests share the blocks of common beginnings.
            "blocks": (1, min(sizes.pool, requests * sizes.blocks), bucket(requests * sizes.blocks)),
            "pool": (1, sizes.pool, sizes.pool),
            # A level of a draft has more columns, of its request's whole tree, than rows.
            "mask": (0, largest * min(sizes.tree, 16) // 4, -(-largest * max(largest, sizes.tree) // 4)),
        }
        profiles.append(_of_inputs(graph, axes))
    return profiles


#: Input of the graph -> its first axis; for a cache that is the pool.
PACKED_AXES = {
    **dict.fromkeys(("token_ids", "positions", "state_rows"), "tokens"),
    "logit_rows": "rows",
    "features": "feature_rows",
    "hidden": "hidden_rows",
    "past_lens": "batch",
    **dict.fromkeys(("seq_begins", "block_begins", "tree_mask_begins"), "batch + 1"),
    "block_indices": "blocks",
    "tree_mask": "mask",
}


def _of_inputs(graph: Path, axes: Mapping[str, Range]) -> Profile:
    """Make a profile; ``axes`` are by the names that PACKED_AXES gives to inputs."""
    profile = {}
    for value in onnx.load(graph, load_external_data=False).graph.input:
        dims = value.type.tensor_type.shape.dim
        axis = PACKED_AXES.get(value.name, "pool")
        ranges = [(d.dim_value,) * 3 if d.HasField("dim_value") else axes[axis] for d in dims]
        minimum, usual, maximum = (tuple(r[i] for r in ranges) for i in range(3))
        profile[value.name] = (minimum, usual, maximum)
    return profile
