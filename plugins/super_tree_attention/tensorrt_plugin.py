"""The operator for TensorRT: a plugin in Python, and the exported graph prepared for TensorRT's parser.

TensorRT calls Python to launch the plugin (just in time, in its words), so a call gets the kernel and the tile that the
PyTorch engine takes for it. Calls are replayed as CUDA graphs, for which Python runs once, at the capture.

The parser finds a plugin by its node's operator, ``plugin_version`` and ``plugin_namespace``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

NAMESPACE, OPERATOR, VERSION = "echo", "SuperTreeAttention", "1"
WRITTEN = ".written"  # suffix of a cache's output, which is bound to the memory of the cache


def register() -> None:
    """Register the plugin, before a graph is parsed and before an engine that has it is loaded.

    Raises ModuleNotFoundError without TensorRT or Triton.
    """
    from super_tree_attention import tensorrt_definitions  # noqa: F401  its import registers it


def prepare_graph(source: Path, target: Path) -> None:
    """Write the exported graph ``source`` for TensorRT's parser to ``target``, in the same folder: they share weights.

    - ``tree_mask`` becomes int32 with four bytes per number (``words``), since plugins take no uint8.
    - Every cache gets an output, named as the cache and WRITTEN, which must be bound to the cache's memory. The two are
      not declared as aliases: TensorRT may then copy every cache.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    inputs = {i.name: i for i in graph.input}
    inputs["tree_mask"].type.tensor_type.elem_type = TensorProto.INT32
    fields = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION, "aot": 0}
    for node in graph.node:
        if (node.domain, node.op_type) != (NAMESPACE, OPERATOR):
            continue
        known = [attribute for attribute in node.attribute if attribute.name == "sliding_window"]
        del node.attribute[:]  # the plugin refuses what it does not know
        node.attribute.extend(known)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in fields.items())
        for cache in node.input[3:5]:
            node.output.append(cache + WRITTEN)
            output = graph.output.add()
            output.CopyFrom(inputs[cache])
            output.name = cache + WRITTEN
    onnx.save(model, target)


def words(tree_mask: np.ndarray) -> np.ndarray:
    """Convert a tree mask, uint8 [n], for the prepared graph: int32 [ceil(n / 4)], with zeros after its bytes."""
    return np.pad(tree_mask, (0, -len(tree_mask) % 4)).view(np.int32)
