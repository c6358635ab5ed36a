"""Our collectives as ``DistCollective``, the operator of TensorRT's collective layer (IDistCollectiveLayer).

TensorRT 11 has the layer, over the NCCL communicator of an execution context; TensorRT-RTX has it from 1.7 on.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from echo_trt.backends.base import COLLECTIVES, DOMAIN

#: Our operator -> collective_operation, reduce_op.
OPERATIONS = dict(zip(COLLECTIVES, (("all_reduce", "sum"), ("all_gather", "none")), strict=True))


def name_collectives(path: Path) -> int:
    """Rewrite the graph at ``path``; returns how many collectives it has."""
    model = onnx.load(path, load_external_data=False)
    collectives = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in OPERATIONS]
    for node in collectives:
        operation, reduction = OPERATIONS[node.op_type]
        attributes = {
            "collective_operation": operation,
            "reduce_op": reduction,
            "root": -1,  # none
            "nb_rank": node.attribute[0].i,
            "group_size": 0,  # all ranks
        }
        node.domain, node.op_type = "", "DistCollective"
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    onnx.save(model, path)
    return len(collectives)
