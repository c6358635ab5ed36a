"""Graphs behind the interface of TensorRT's session, run on the CPU."""

import torch
from pairs import recipe_of, roles_of

from echo_trt.backends.base import METADATA
from echo_trt.backends.onnx_export import export
from echo_trt.backends.tensorrt.engine import TensorRTEngine
from echo_trt.backends.tensorrt.profiles import packed_profiles
from echo_trt.backends.tensorrt.session import profile_for
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.models.roles import project_in_target
from super_tree_attention import super_tree_attention
from super_tree_attention.tensorrt_plugin import WRITTEN, prepare_graph

SLOTS = 4


class RoleSession:
    """A graph behind the session's interface: its role on the CPU, the reference in the plugins' place."""

    name, device = "test.engine", torch.device("cpu")

    def __init__(self, role, graph, sizes: CallSizes):
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
        self.launched: list[tuple[int, ...]] = []
        self.recurring: set[tuple] = set()  # shapes of calls for which the engine keeps a context

    def largest(self, name, axis, profile=0):
        return self._profiles[profile][name][1][axis]

    def width(self, output):
        return self._role.network.config.vocab_size if output == "logits" else self._role.top_k

    def launch(self, tensors, aliases, recurs=True):
        shapes = {name: tuple(tensors[name].shape) for name in self.inputs}
        profile_for(self._profiles, shapes)
        self.launched.append(shapes["token_ids"])
        if recurs:
            self.recurring.add(tuple(shapes.values()))
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
    """Return the role, as a build for TensorRT has it, its engine, and its session."""
    sizes, roles = CallSizes.of(recipe_of(pair, networks)), roles_of(pair, networks)
    roles["target"].projection = project_in_target(roles.get("draft"))
    role = roles[name]
    graph = folder / f"{name}.onnx"
    export(role, graph)
    prepare_graph(graph, graph)
    session = RoleSession(role, graph, sizes)
    return role, TensorRTEngine(session, SLOTS, sizes.blocks, SLOTS * sizes.blocks), session
