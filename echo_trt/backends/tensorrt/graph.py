"""An ONNX graph made ready for TensorRT: checks, since its parser misreads some graphs and crashes on others, and our
collectives as ``DistCollective``, the operator of its collective layer (IDistCollectiveLayer).

TensorRT 11 has the layer, over the NCCL communicator of an execution context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from echo_trt.backends.base import COLLECTIVES, DOMAIN
from echo_trt.errors import UserError
from super_tree_attention.tensorrt_plugin import NAMESPACE, OPERATOR

#: Our operators, (domain, name), that are plugins.
PLUGINS = frozenset({(NAMESPACE, OPERATOR)})
#: Our operator -> collective_operation, reduce_op.
OPERATIONS = dict(zip(COLLECTIVES, (("all_reduce", "sum"), ("all_gather", "none")), strict=True))


def check_graph(path: Path, knows: Callable[[str], bool]) -> None:
    """Refuse a graph that TensorRT would abort on, pass over or compute wrongly.

    ``knows`` returns whether its parser has a standard operator.
    """
    model = onnx.load(path, load_external_data=False)
    for node in _nodes(model.graph):
        name = f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        if (node.domain, node.op_type) in PLUGINS:
            continue
        if name != node.op_type or not knows(node.op_type):
            raise UserError(
                f"{path}: operator {name} is not one that TensorRT compiles; "
                "export the network with echo-trt build, or use --engine cpu."
            )
        if problem := _silent_trap(node):
            raise UserError(f"{path}: {problem}, which TensorRT gets wrong; export the network with echo-trt build.")
    used = {name for node in _nodes(model.graph) for name in node.input} | {o.name for o in model.graph.output}
    if unused := [i.name for i in model.graph.input if i.name not in used]:
        raise UserError(f"{path}: input {unused[0]} is not used by any operator; export the network again.")
    _check_masks(path, model)


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                yield from _nodes(inner)


def _silent_trap(node: NodeProto) -> str:
    """Return why a standard operator would be computed wrongly, or an empty text."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Attention" and any(node.input[4:]):
        return f"Attention {node.name} has inputs beyond its mask"
    if node.op_type == "Attention" and any(node.output[1:]):
        return f"Attention {node.name} has more than one output"
    if node.op_type == "TensorScatter" and attributes.get("mode", b"linear") != b"linear":
        return f"TensorScatter {node.name} is not linear"
    return ""


def _check_masks(path: Path, model: ModelProto) -> None:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.value_info)}
    for node in _nodes(model.graph):
        mask = node.input[3] if node.op_type == "Attention" and len(node.input) > 3 else ""
        if types.get(mask) == TensorProto.BOOL:
            raise UserError(
                f"{path}: Attention {node.name} has a bool mask, which TensorRT gets wrong in more than one layer; "
                "use a mask that is added to the scores."
            )


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
