"""The operator for TensorRT: two plugins in Python, and the exported graph prepared for TensorRT's parser.

A plugin is one kernel, so that TensorRT may compile it into the engine (ahead of time, the default) or call Python to
launch it (just in time). ``echo::SuperTreeAttention`` leaves the results of several splits to
``echo::SuperTreeCombine``, which merges them in place, in memory that TensorRT owns.

The parser finds a plugin by its node's operator, ``plugin_version`` and ``plugin_namespace``; the node's ``aot``
chooses between the two ways.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from super_tree_attention.tensorrt_names import ATTENTION, COMBINE, NAMESPACE, VERSION, WRITTEN


def register() -> None:
    """Register both plugins, before a graph is parsed and before an engine that launches them just in time is loaded.

    Raises ModuleNotFoundError without TensorRT.
    """
    from super_tree_attention import tensorrt_definitions  # noqa: F401  its import registers them


def prepare_graph(source: Path, target: Path, ahead_of_time: bool = True, alias_caches: bool = False) -> None:
    """Write the exported graph ``source`` for TensorRT's parser to ``target``, in the same folder: they share weights.

    - ``tree_mask`` becomes int32 with four bytes per number (``words``), since plugins take no uint8.
    - Every cache gets an output, named as the cache and WRITTEN, which must be bound to the cache's memory.
      ``alias_caches`` also declares the two as aliases. TensorRT may then copy every cache, so NVIDIA's plugins do
      without (TensorRT-Edge-LLM's AttentionPlugin). The merge's result is always declared an alias, which takes
      PreviewFeature.ALIASED_PLUGIN_IO_10_03.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    inputs = {i.name: i for i in graph.input}
    inputs["tree_mask"].type.tensor_type.elem_type = TensorProto.INT32
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if (node.domain, node.op_type) != (NAMESPACE, ATTENTION):
            continue
        result = node.output[0]
        caches = node.input[3:5]
        scratch = [f"{result}.{part}" for part in ("attended", "partial", "partial_lse")]
        node.output[:] = [*scratch, *(cache + WRITTEN for cache in caches)]
        _add_attributes(node, ahead_of_time, alias_caches=int(alias_caches))
        merged = [*node.input[5:9], *scratch[1:], scratch[0]]
        nodes.append(helper.make_node(COMBINE, merged, [result], domain=NAMESPACE))
        nodes[-1].attribute.extend(a for a in node.attribute if a.name in ("num_kv_heads", "head_dim"))
        _add_attributes(nodes[-1], ahead_of_time)
        for cache in caches:
            output = graph.output.add()
            output.CopyFrom(inputs[cache])
            output.name = cache + WRITTEN
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, target)


def words(tree_mask: np.ndarray) -> np.ndarray:
    """Convert a tree mask, uint8 [n], for the prepared graph: int32 [ceil(n / 4)], with zeros after its bytes."""
    return np.pad(tree_mask, (0, -len(tree_mask) % 4)).view(np.int32)


def _add_attributes(node, ahead_of_time: bool, **more: int) -> None:
    from onnx import helper

    fields = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION, "aot": int(ahead_of_time), **more}
    node.attribute.extend(helper.make_attribute(name, value) for name, value in fields.items())
