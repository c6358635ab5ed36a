"""Each family on each engine: transformers' logits, for a prompt in parts and for a tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends.cut_graph import CutGraph
from models.checkpoints import BUILDERS, HYBRID_LAYERS
from pairs import SIZES, VOCAB
from transformers import AutoModelForCausalLM

from echo_trt.backends.base import METADATA, Engine
from echo_trt.backends.cpu.build import compile_role
from echo_trt.backends.cpu.engine import CPUEngine
from echo_trt.backends.kind import engine_kinds
from echo_trt.backends.onnx_export import export
from echo_trt.backends.openvino.build import export_parted
from echo_trt.backends.openvino.engine import OpenVINOEngine
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.models.families import FAMILIES
from echo_trt.models.families.family import Family
from echo_trt.models.hybrid_config import RecurrentConfig
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.roles import TargetModule
from echo_trt.models.weights import load_decoder
from echo_trt.speculation.pack import BLOCK, ForwardBatch, pack
from echo_trt.speculation.planner import Explanation, Plan
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask
from super_tree_attention import super_tree_attention

BLOCKS, PROMPT, MORE = 3, 37, 9
#: Beside SIZES, so that three layers have what a family's deeper networks have.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3": {"sliding_window": 20},
    "mistral": {"sliding_window": 20},
    "qwen3_5": HYBRID_LAYERS,
    "smollm3": {"no_rope_layer_interval": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


class PackedGraph(Engine):
    """The graph that TensorRT compiles, with the operator's reference in the plugin's place."""

    def __init__(self, path: Path):
        self._graph = CutGraph(path, {"SuperTreeAttention": self._attention})
        shapes = {n: [d.dim_value for d in t.shape.dim][1:] for n, t in self._graph.inputs.items() if "_cache." in n}
        self._caches = {name: np.zeros((BLOCKS, *shape), np.float32) for name, shape in shapes.items()}

    def run(self, call: ForwardBatch) -> dict[str, np.ndarray]:
        names = ("token_ids", "positions", *METADATA, "logit_rows")
        return self._graph.run({name: getattr(call, name) for name in names} | self._caches)

    @staticmethod
    def _attention(*inputs: np.ndarray, **attributes: int) -> np.ndarray:
        return super_tree_attention(*map(torch.from_numpy, inputs), attributes["sliding_window"]).numpy()


def _openvino(role: TargetModule, path: Path, precision: str) -> OpenVINOEngine:
    export_parted(role, path)
    return OpenVINOEngine(path, precision, BLOCKS)


def _torch(role: TargetModule, path: Path, precision: str) -> TorchEngine:
    return TorchEngine(role.to(torch.bfloat16) if precision == "bf16" else role, BLOCKS)


def _tensorrt(role: TargetModule, path: Path, precision: str) -> PackedGraph:
    export(role, path)
    return PackedGraph(path)


def _cpu(role: TargetModule, path: Path, precision: str) -> CPUEngine:
    compile_role(role, path, precision)
    return CPUEngine(path, precision, BLOCKS)


ENGINES: dict[str, Callable[[TargetModule, Path, str], Any]] = {
    "cpu": _cpu,
    "openvino": _openvino,
    "torch": _torch,
    "tensorrt": _tensorrt,
}


def engines_of(family: Family) -> list[str]:
    hybrid = issubclass(family.config, RecurrentConfig)
    return [kind.name for kind in engine_kinds() if kind.states or not hybrid]


CASES = [(family.name, engine) for family in FAMILIES.values() for engine in engines_of(family)]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], Path]:
    """family -> a small checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("families")

    def get(family: str) -> Path:
        if not (folder / family).exists():
            BUILDERS[family](**SIZES | CHANGES.get(family, {})).save_pretrained(folder / family)
        return folder / family

    return get


def logits_of_both(folder: Path, engine: str, path: Path, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Return transformers' logits and the engine's, [rows, V], of a prompt in two parts and of a tree behind it."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    role = TargetModule(load_decoder(open_checkpoint(folder), BLOCKS * BLOCK))
    ours = ENGINES[engine](role, path, precision)
    rng, table, text = np.random.default_rng(3), np.arange(BLOCKS)[None], PROMPT + MORE
    tokens = rng.integers(0, VOCAB, text)
    tree = SuperTree.from_roots(rng.integers(0, VOCAB, 1))
    for parent in (0, 0, 1, 1, 2, 3):
        tree.add(np.array([parent]), rng.integers(0, VOCAB, 1), np.zeros(1))
    # An engine that counts the rows of a window takes a single path beyond it.
    sure = np.ones(len(tree))
    tree = ours.exact(Plan(tree, sure, Explanation(tree, sure, np.arange(len(tree)))), np.array([text])).tree

    def call(ids: np.ndarray, positions: np.ndarray, past: int, mask: Any = None) -> np.ndarray:
        packed = pack(ids, positions, np.array([past]), np.array([len(ids)]), table, np.arange(len(ids)), mask)
        logits = np.array(ours.run(packed)["logits"], np.float32)
        ours.commit(np.arange(len(ids)), np.array([len(ids)]))
        return logits

    begins = [(0, PROMPT), (PROMPT, text)]
    got = [call(tokens[begin:end], np.arange(begin, end), begin) for begin, end in begins]
    got.append(call(tree.token, text + tree.depth, text, ancestor_mask(tree)))
    wanted = []
    with torch.no_grad():
        wanted.append(theirs(torch.from_numpy(tokens)[None]).logits[0].numpy())
        for node in range(len(tree)):
            branch: list[int] = []
            while node >= 0:
                branch, node = [int(tree.token[node]), *branch], int(tree.parent[node])
            whole = torch.tensor([[*tokens.tolist(), *branch]])
            wanted.append(theirs(whole).logits[0, -1:].numpy())
    return np.concatenate(wanted), np.concatenate(got)


@pytest.mark.parametrize(("family", "engine"), CASES)
def test_logits_are_transformers_in_fp32(family, engine, written, tmp_path):
    wanted, got = logits_of_both(written(family), engine, tmp_path / "target.onnx", "fp32")
    assert 5 < np.abs(wanted).max() < 100
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "engine"), [case for case in CASES if case[1] in ("cpu", "openvino")])
def test_the_best_token_is_transformers_in_bf16(family, engine, written, tmp_path):
    """Wherever it leads by more than what rounding moves; in a mixture, rounding may also choose another expert."""
    wanted, got = logits_of_both(written(family), engine, tmp_path / "target.onnx", "bf16")
    second, first = np.sort(wanted, axis=1)[:, -2:].T
    sure = first - second > 0.02 * np.abs(wanted).max()
    assert sure.sum() > 30
    same = (got.argmax(1) == wanted.argmax(1))[sure].mean()
    assert same == 1 or (FAMILIES[family].name == "qwen3_moe" and same > 0.85)


def test_every_family_has_a_builder_and_the_engines_that_it_names():
    assert FAMILIES.keys() == BUILDERS.keys()
    assert [kind.name for kind in engine_kinds()] == sorted(ENGINES)
    assert all(type(BUILDERS[name]()).__name__ == family.architecture for name, family in FAMILIES.items())
