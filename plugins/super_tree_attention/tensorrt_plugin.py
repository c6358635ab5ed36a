"""The operator for TensorRT: two plugins in Python, and the exported graph as TensorRT's parser takes it.

Each plugin is one kernel, so that TensorRT may compile it into the engine (ahead of time, the default) or call Python
to launch it (just in time). ``echo::SuperTreeAttention`` leaves what several splits of a past have found to
``echo::SuperTreeCombine``, which merges it in place. TensorRT owns the memory between them.

The parser finds a plugin by its node's operator, ``plugin_version`` and ``plugin_namespace``, and takes the node's
``aot`` for which of the two ways is meant.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

NAMESPACE, VERSION = "echo", "1"
ATTENTION, COMBINE = "SuperTreeAttention", "SuperTreeCombine"
#: A cache's output is bound to the memory of the cache itself.
WRITTEN = ".written"


def register() -> None:
    """Make both plugins known to this process's TensorRT: before a graph is parsed, and before an engine that launches
    them just in time is loaded. ModuleNotFoundError without TensorRT."""
    from super_tree_attention import tensorrt_definitions  # noqa: F401  registers as it is imported


def prepare_graph(source: Path, target: Path, ahead_of_time: bool = True, alias_caches: bool = False) -> None:
    """Write the exported graph ``source`` for TensorRT's parser to ``target``, in the same folder: they share weights.

    - ``tree_mask`` becomes int32, four of its bytes a number (``words``), since plugins take no uint8.
    - Every cache gets an output, named as the cache and WRITTEN: bind it to the cache's own memory. ``alias_caches``
      also tells TensorRT that they are one. It may then keep a copy of each cache, so NVIDIA's own plugins leave that
      unsaid (TensorRT-Edge-LLM's AttentionPlugin); the merge says it of its result in any case, which takes
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
        merged = [*node.input[5:8], *scratch[1:], scratch[0]]
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
    """A tree mask as the prepared graph takes it: uint8 [n], and zeros after it, read as int32 [ceil(n / 4)]."""
    return np.pad(tree_mask, (0, -len(tree_mask) % 4)).view(np.int32)


def _add_attributes(node, ahead_of_time: bool, **more: int) -> None:
    from onnx import helper

    fields = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION, "aot": int(ahead_of_time), **more}
    node.attribute.extend(helper.make_attribute(name, value) for name, value in fields.items())


def relist_parameters(ptx: str, order: list[int | None], name: str) -> tuple[str, str]:
    """A kernel's new name and PTX, whose parameters are those of ``order``; None is a pointer that it does not read.

    The name begins with ``echo_`` and ends with ``name``: those of one engine are told apart.

    TensorRT passes all inputs, then the extra integers, then all outputs. The two pointers at the end of a Triton
    kernel (its scratch memory) are not among them.
    """
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\n\)", ptx, re.DOTALL)
    if entry is None:
        raise ValueError("the PTX has no entry")
    known = [line.strip().rstrip(",") for line in entry[2].strip().splitlines()]
    for line in (known[i] for i in range(len(known)) if i not in order):
        if re.search(rf"\b{line.split()[-1]}\b", ptx[entry.end() :]):
            raise ValueError(f"{entry[1]} reads its parameter {line.split()[-1]}, which TensorRT does not pass")
    unread = (f".param .u64 .ptr .global .align 1 {entry[1]}_unread_{place}" for place in range(len(order)))
    lines = [next(unread) if i is None else known[i] for i in order]
    relisted = ptx[: entry.start(2)] + "\n\t" + ",\n\t".join(lines) + ptx[entry.end(2) :]
    return f"echo_{name}", re.sub(rf"\b{entry[1]}(?=\b|_(param|unread)_)", f"echo_{name}", relisted)
