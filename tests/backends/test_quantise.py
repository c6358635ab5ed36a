"""Weights in 8 and 4 bits: their numbers, and bundles that are built of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from driving import SPECULATION_PAYS, goodput_planner
from onnx import numpy_helper
from pairs import recipe_of, roles_of

from echo_trt import LLM, SamplingParams
from echo_trt.backends.openvino import graph
from echo_trt.backends.openvino import quantise as quantisation
from echo_trt.backends.openvino.export import export_parted
from echo_trt.backends.openvino.quantise import GROUP, quantise
from echo_trt.backends.self_check import RISES
from echo_trt.cli.build import build

PROMPTS = [[7, 8, 9], [*range(40, 90)], [5, 6, 5, 6, 5]]


def weights(path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def quantised(networks, folder, precision: str, role=None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the target's numbers before and after, by name."""
    path = folder / "target.onnx"
    export_parted(role or roles_of("lookup", networks)["target"], path)
    exact = weights(path)
    quantise(path, precision)
    return exact, weights(path)


def dequantised(stored: dict[str, np.ndarray], name: str) -> np.ndarray:
    integers, scale = (stored[f"{name}_{part}"].astype(np.float32) for part in ("quantized", "scale"))
    if f"{name}_zero" in stored:
        numbers = (integers - stored[f"{name}_zero"].astype(np.float32)) * scale
        return numbers.reshape(len(numbers), -1)
    return integers * scale[:, None]


def test_eight_bits_are_within_a_step(networks, tmp_path):
    exact, stored = quantised(networks, tmp_path, "int8")
    matrices = [name for name in exact if f"{name}_quantized" in stored]
    assert len(matrices) == 2 + 3 * 5  # embedding, output, and of each layer qkv, out, gate, up, down
    for name in matrices:
        error = np.abs(dequantised(stored, name) - exact[name])
        assert (error.max(-1) <= 1.01 * np.abs(stored[f"{name}_scale"])).all()
        assert error.max() <= 1.02 * np.abs(exact[name]).max() / 127


def test_four_bits_are_within_half_a_step_and_keep_weights_that_had_four(networks, tmp_path):
    """Of rows that groups divide, in layers; a network of those numbers has them again."""
    role = roles_of("lookup", networks)["target"]
    exact, stored = quantised(networks, tmp_path, "int4", role)
    four = {name for name in exact if f"{name}_zero" in stored}
    assert len(four) == 3 * 5 == len({name for name in exact if f"{name}_quantized" in stored}) - 2
    for name in four:
        step = np.repeat(stored[f"{name}_scale"].reshape(len(exact[name]), -1), GROUP, axis=1).astype(np.float32)
        assert (np.abs(dequantised(stored, name) - exact[name]) <= 0.52 * step).all()
    parameters = dict(role.named_parameters(prefix="role"))
    for name in four & set(parameters):  # others are halves of a parameter
        parameters[name].data = torch.from_numpy(dequantised(stored, name))
    same, again = quantised(networks, tmp_path, "int4", role)
    for name in four & set(parameters):
        step = again[f"{name}_scale"].max()
        assert np.abs(dequantised(again, name) - same[name]).max() < 0.02 * step


def test_a_matrix_in_pieces_has_the_same_numbers(networks, tmp_path, monkeypatch):
    role = roles_of("lookup", networks)["target"]
    stored = []
    for chunk in (quantisation.CHUNK, 50 * 64):
        monkeypatch.setattr(quantisation, "CHUNK", chunk)
        export_parted(role, tmp_path / "target.onnx")
        quantise(tmp_path / "target.onnx", "int8")
        stored.append(weights(tmp_path / "target.onnx"))
    assert stored[0].keys() == stored[1].keys()
    assert all((stored[0][name] == stored[1][name]).all() for name in stored[0])


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integers_are_left_to_openvino(precision, networks, tmp_path):
    """Their conversions are not marked: with the mark, OpenVINO makes them fp32 matrices in memory of its own."""
    quantised(networks, tmp_path, precision)
    model = graph.read_graph(tmp_path / "target.onnx")
    graph.compile_graph(model, precision)
    converted = [node for node in model.get_ops() if node.get_type_name() == "Convert" and graph._is_weight(node)]
    assert converted
    assert not any(graph.DECOMPRESSION in node.get_rt_info() for node in converted)


def test_narrow_floats_are_kept(networks, tmp_path):
    role = roles_of("lookup", networks)["target"]
    for parameter in role.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.bfloat16()
    export_parted(role, tmp_path / "target.onnx")
    model = graph.read_graph(tmp_path / "target.onnx")
    graph.compile_graph(model, "fp32")
    converted = [node for node in model.get_ops() if node.get_type_name() == "Convert" and graph._is_weight(node)]
    assert converted
    assert all(graph.DECOMPRESSION in node.get_rt_info() for node in converted)


@pytest.mark.parametrize(("precision", "bound"), [("int8", RISES["int8"]), ("int4", 5.0)])  # tiny
def test_chains_of_few_bits_give_plain_decoding_s_texts(precision, bound, networks, tmp_path, monkeypatch):
    """A tree rounds differently, so policies that verify trees promise less; with a head: engine/test_same_bits.py."""
    monkeypatch.setitem(RISES, precision, bound)
    manifest = build(recipe_of("lookup", networks, precision=precision), networks, tmp_path / precision)
    check = manifest.checks["target"]
    assert 1e-5 < check.prompt_error < check.bound == bound
    assert check.measure == "perplexity"
    params, plain = SamplingParams(16, ignore_eos=True), None
    for policy, batch in (("autoregressive", 1), ("autoregressive", 3), ("goodput-exact", 3), ("goodput", 1)):
        llm = LLM(tmp_path / precision, "autoregressive", batch)
        if policy != "autoregressive":
            llm.loop.planner = goodput_planner(llm, SPECULATION_PAYS, policy)
        texts = [completion.token_ids for completion in llm.generate(PROMPTS, params)]
        assert (llm.counters.drafted_tokens > 0) == (policy != "autoregressive")
        plain = plain or texts
        assert texts == plain, (policy, batch)
