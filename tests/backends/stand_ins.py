"""Standard operators in the places of plugin nodes: TensorRT-RTX, which needs no GPU, then builds TensorRT's graphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import helper

from echo_trt.backends.tensorrt.compiler import _build
from super_tree_attention.tensorrt_plugin import NAMESPACE, OPERATOR, WRITTEN


def with_stand_ins(source: Path, target: Path) -> None:
    """Write the prepared graph ``source`` to ``target``: query, key and value meet row by row; caches are copied."""
    model = onnx.load(source, load_external_data=False)
    nodes = []
    for node in model.graph.node:
        if (node.domain, node.op_type) == (NAMESPACE, OPERATOR):
            query, key, value, *caches = node.input[:5]
            total, mean = f"{node.output[0]}.total", f"{node.output[0]}.mean"
            nodes += [
                helper.make_node("Add", [key, value], [total]),
                helper.make_node("ReduceMean", [total, "stand_in_axis"], [mean], keepdims=1),
                helper.make_node("Add", [query, mean], [node.output[0]]),
                *(helper.make_node("Identity", [cache], [cache + WRITTEN]) for cache in caches),
            ]
        else:
            nodes.append(node)
    model.graph.initializer.append(helper.make_tensor("stand_in_axis", onnx.TensorProto.INT64, [1], [1]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)


def built(graph: Path, profile: Mapping[str, tuple], api, logger, detail=lambda share, phase: None) -> bool:
    """Return whether TensorRT-RTX builds ``graph`` for one profile; the logger has what it says."""
    builder = api.Builder(logger)
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert api.OnnxParser(network, logger).parse_from_file(str(graph)), logger.errors()
    config, made = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(api.ComputeCapability.SM89, 0)
    for name, (minimum, usual, maximum) in profile.items():
        made.set_shape(name, minimum, usual, maximum)
    config.add_optimization_profile(made)
    return _build(api, builder, network, config, detail) is not None
