"""An exported graph with operators of ours in it, run by ONNX Runtime from each of those to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from echo_trt.backends.base import DOMAIN

#: Computes a node of ours from its inputs.
Operator = Callable[..., np.ndarray]


class CutGraph:
    """``operators``: by op_type, those of the domain echo."""

    def __init__(self, path: Path, operators: Mapping[str, Operator]):
        model = onnx.load(path)
        graph = model.graph
        self._operators = operators
        self.inputs = {i.name: i.type.tensor_type for i in graph.input}
        self.outputs = [o.name for o in graph.output]
        initialisers = {i.name: i for i in graph.initializer}
        types = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
        level: dict[str, int] = {}  # how many of our operators a value comes after
        segments: dict[int, list[onnx.NodeProto]] = {}
        self._ours: dict[int, list[onnx.NodeProto]] = {}
        for node in graph.node:
            at, ours = max((level.get(name, 0) for name in node.input), default=0), node.domain == DOMAIN
            level.update(dict.fromkeys(node.output, at + ours))
            (self._ours if ours else segments).setdefault(at, []).append(node)
        self._sessions = {}
        for at, nodes in segments.items():
            made = {name for node in nodes for name in node.output}
            used = {name for node in nodes for name in node.input if name}
            others = [n for n in graph.node if not any(n is own for own in nodes)]
            wanted = {name for node in others for name in node.input} | set(self.outputs)
            part = helper.make_graph(
                nodes,
                f"part{at}",
                [_typed(types[name]) for name in sorted(used - made - set(initialisers))],
                [_typed(types[name]) for name in sorted(made & wanted)],
                [initialisers[name] for name in sorted(used & set(initialisers))],
            )
            whole = helper.make_model(part, opset_imports=[o for o in model.opset_import if o.domain != DOMAIN])
            self._sessions[at] = ort.InferenceSession(
                whole.SerializeToString(), providers=["CPUExecutionProvider"], sess_options=_one_thread()
            )

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = dict(feeds)
        for at in range(max(*self._sessions, *self._ours) + 1):
            if at in self._sessions:
                session = self._sessions[at]
                names = [o.name for o in session.get_outputs()]
                given = {i.name: values[i.name] for i in session.get_inputs()}
                values |= dict(zip(names, session.run(names, given), strict=True))
            for node in self._ours.get(at, []):
                attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                values[node.output[0]] = self._operators[node.op_type](*(values[n] for n in node.input), **attributes)
        return {name: values[name] for name in self.outputs}

    @property
    def operators(self) -> list[str]:
        return [node.op_type for nodes in self._ours.values() for node in nodes]


def _typed(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """Without its shape, which ONNX Runtime would hold it to."""
    return helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, None)


def _one_thread() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return options
