"""Features that the target projects for its draft, as with TensorRT: by OpenVINO, which has the same graphs."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from pairs import recipe_of, roles_of
from refusal import refused

from echo_trt.backends.kind import OnCard, engine_kind
from echo_trt.backends.self_check import check_engine
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.bundle.manifest import MANIFEST, read_manifest
from echo_trt.cli import build as module
from echo_trt.engine.kv_pool import block_bytes
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.models.roles import TargetModule, project_in_target

PAIRS = pytest.mark.parametrize("pair", ["eagle3", "close", "dflash", "peagle"], scope="module")


@pytest.fixture(scope="module")
def projecting(pair, networks, tmp_path_factory):
    """Build the pair as for an engine whose target projects features."""
    kind = replace(engine_kind("openvino"), card=OnCard(layer_nodes=10, projects_features="target"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "engine_kind", lambda name: kind)
        out = tmp_path_factory.mktemp(pair) / "bundle"
        module.build(recipe_of(pair, networks), networks, out)
    return out


def drafted(bundle):
    """Return the texts of some prompts, and the tokens that were accepted and drafted."""
    llm = LLM(bundle, "echo", 3)
    prompts = [np.arange(5 * n, 5 * n + 9) % llm.manifest.target.vocab_size for n in range(3)]
    texts = [answer.token_ids for answer in llm.generate(prompts, SamplingParams(24, ignore_eos=True))]
    return texts, llm.loop.counters.accepted_tokens, llm.loop.counters.drafted_tokens


@PAIRS
def test_texts_and_drafts_are_the_same(pair, projecting, bundle_of):
    assert drafted(projecting) == drafted(bundle_of(pair))


@PAIRS
def test_graphs_pass_a_hidden_state_on(projecting):
    facts = read_manifest(projecting)
    width = facts.draft.hidden_size
    assert facts.draft.projected
    assert facts.draft.feature_size == width
    for network, values in (("target", "output"), ("draft", "input")):
        graph = onnx.load(projecting / f"{network}.onnx", load_external_data=False).graph
        [found] = [value for value in getattr(graph, values) if value.name == "features"]
        assert found.type.tensor_type.shape.dim[1].dim_value == width


@PAIRS
def test_a_manifest_whose_sizes_differ_is_refused(projecting, tmp_path):
    raw = read_manifest(projecting).model_dump(mode="json")
    raw["draft"]["feature_size"] *= 3
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    with refused("draft.feature_size", "build the bundle again"):
        read_manifest(tmp_path)


@PAIRS
def test_a_pool_has_memory_for_what_is_kept(projecting, bundle_of, pair, monkeypatch):
    monkeypatch.setattr("echo_trt.backends.kind._has_gpu", lambda: True)
    small, large = (read_manifest(each).draft for each in (projecting, bundle_of(pair)))
    bytes_of = [block_bytes("tensorrt", [(facts, "bf16")]) for facts in (small, large)]
    assert bytes_of[1] - bytes_of[0] == 32 * 2 * (large.feature_size - small.hidden_size)


@pytest.mark.parametrize("pair", ["lookup", "model"])
def test_a_draft_without_features_projects_none(pair, networks):
    assert project_in_target(roles_of(pair, networks).get("draft")) is None


def test_a_projection_that_is_wrong_fails_the_self_check(networks):
    roles = roles_of("eagle3", networks)
    role, wrong = roles["target"], TargetModule(roles["target"].network, roles["target"].feature_layers)
    role.projection = project_in_target(roles["draft"])
    wrong.projection = deepcopy(role.projection)
    check_engine(role, lambda blocks: TorchEngine(role, blocks), "fp32")
    torch.nn.init.zeros_(wrong.projection.network.fc.weight)
    with refused("self-check failed", "build with another --precision"):
        check_engine(role, lambda blocks: TorchEngine(wrong, blocks), "fp32")
