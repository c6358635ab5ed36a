"""Graphs behind the interface of TensorRT's session, run on the CPU."""

import numpy as np
import onnxruntime as ort
import torch
from pairs import recipe_of, roles_of

from echo_trt.backends.base import METADATA
from echo_trt.backends.onnx_export import export
from echo_trt.backends.tensorrt.engine import TensorRTEngine
from echo_trt.backends.tensorrt.profiles import native_profiles, packed_profiles
from echo_trt.backends.tensorrt.session import profile_for
from echo_trt.bundle.call_sizes import CallSizes
from super_tree_attention import super_tree_attention
from super_tree_attention.tensorrt_plugin import WRITTEN, prepare_graph

SLOTS = 4


class OnnxSession:
    """A native graph behind the session's interface, with the profiles its engine would be built for, on the CPU."""

    name, device = "test.engine", torch.device("cpu")

    def __init__(self, graph, sizes: CallSizes):
        self._session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        profiles = native_profiles(graph, sizes)
        self._profiles = [
            {name: (minimum, maximum) for name, (minimum, _, maximum) in profile.items()} for profile in profiles
        ]
        self.inputs = [i.name for i in self._session.get_inputs()]
        self.outputs = [o.name for o in self._session.get_outputs()]
        known = {"float": torch.float32, "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8}
        self.types = {i.name: known[i.type[len("tensor(") : -1]] for i in self._session.get_inputs()}
        self.num_profiles = len(profiles)
        self.launched: list[tuple[int, int]] = []
        self.recurring: set[tuple] = set()  # shapes of calls for which the engine keeps a context

    def _check(self, tensors, recurs):
        shapes = {name: tuple(tensors[name].shape) for name in self.inputs}
        profile_for(self._profiles, shapes)
        self.launched.append(shapes["token_ids"])
        if recurs:
            self.recurring.add(tuple(shapes.values()))

    def largest(self, name, axis, profile=0):
        return self._profiles[profile][name][1][axis]

    def width(self, output):
        return next(o.shape[-1] for o in self._session.get_outputs() if o.name == output)

    def launch(self, tensors, aliases, recurs=True):
        self._check(tensors, recurs)
        outputs = self._session.run(None, {name: tensors[name].numpy() for name in self.inputs})
        named = {name: torch.from_numpy(np.array(o)) for name, o in zip(self.outputs, outputs, strict=True)}
        for name, alias in aliases.items():
            tensors[alias].copy_(named.pop(name))  # in place, as the engine writes
        return named


class RoleSession(OnnxSession):
    """The packed graph behind the session's interface: its role with the reference operator in the plugins' place."""

    def __init__(self, role, graph, sizes):
        profiles = packed_profiles(graph, sizes)
        self._role = role
        self._profiles = [
            {name: (minimum, maximum) for name, (minimum, _, maximum) in profile.items()} for profile in profiles
        ]
        self.inputs = list(profiles[0])
        caches = [name for name in self.inputs if "_cache." in name]
        self.outputs = [*role.outputs, *(name + WRITTEN for name in caches)]
        floats = {*caches, "features", "hidden"}
        longs = {"token_ids", "positions", "state_rows", "logit_rows"}
        self.types = {
            name: torch.float32 if name in floats else torch.int64 if name in longs else torch.int32
            for name in self.inputs
        }
        self.types["logits"] = torch.float32
        self.num_profiles = len(profiles)
        self.launched, self.recurring = [], set()

    def width(self, output):
        return self._role.network.config.vocab_size if output == "logits" else self._role.top_k

    def launch(self, tensors, aliases, recurs=True):
        self._check(tensors, recurs)
        assert all(tensors[name].dtype == self.types[name] for name in self.inputs)
        assert aliases == {name + WRITTEN: name for name in self.inputs if "_cache." in name}
        metadata = [tensors[name] for name in METADATA]
        metadata[METADATA.index("tree_mask")] = tensors["tree_mask"].view(torch.uint8)

        def attend(layer, query, key, value):
            caches = tensors[f"key_cache.{layer}"], tensors[f"value_cache.{layer}"]
            return super_tree_attention(query, key, value, *caches, *metadata)

        outputs = self._role(tensors, tensors["logit_rows"], attend)
        return dict(zip(self._role.outputs, outputs, strict=True))


def packed(name, networks, folder, pair="eagle3"):
    """Return the role, its engine over a paged pool, and its session."""
    sizes = CallSizes.of(recipe_of(pair, networks))
    role = roles_of(pair, networks)[name]
    graph = folder / f"{name}.onnx"
    export(role, graph)
    prepare_graph(graph, graph)
    session = RoleSession(role, graph, sizes)
    return role, TensorRTEngine(session, SLOTS, sizes.blocks, SLOTS * sizes.blocks), session
