"""Weights in 8 and 4 bits: their numbers, and bundles that are built of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from driving import SPECULATION_PAYS, goodput_planner
from onnx import TensorProto, numpy_helper
from pairs import recipe_of, roles_of

from echo_trt import LLM, SamplingParams
from echo_trt.backends.openvino import graph
from echo_trt.backends.openvino import quantise as quantisation
from echo_trt.backends.openvino.export import export_parted
from echo_trt.backends.openvino.quantise import GROUP, quantise
from echo_trt.cli.build import build

PROMPTS = [[7, 8, 9], [*range(40, 90)], [5, 6, 5, 6, 5]]


def weights(path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(("precision", "steps"), [("int8", 127), ("int4", 7)])
def test_numbers_are_within_half_a_step(precision, steps, networks, tmp_path):
    export_parted(roles_of("lookup", networks)["target"], tmp_path / "target.onnx")
    exact = weights(tmp_path / "target.onnx")
    quantise(tmp_path / "target.onnx", precision)
    stored = weights(tmp_path / "target.onnx")
    matrices = [name for name in exact if f"{name}_quantized" in stored]
    assert len(matrices) == 2 + 3 * 5  # embedding, output, and of each layer qkv, out, gate, up, down
    for name in matrices:
        integers, scale = (stored[f"{name}_{part}"].astype(np.float32) for part in ("quantized", "scale"))
        grouped = integers.reshape(*scale.shape, -1)
        error = np.abs((grouped * scale[..., None]).reshape(integers.shape) - exact[name])
        assert (error.reshape(grouped.shape).max(-1) <= 1.01 * np.abs(scale)).all()
        assert error.max() <= 1.02 * np.abs(exact[name]).max() / steps


def test_four_bits_are_those_of_rows_that_groups_divide(networks, tmp_path):
    export_parted(roles_of("lookup", networks)["target"], tmp_path / "target.onnx")
    quantise(tmp_path / "target.onnx", "int4")
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "target.onnx").graph.initializer}
    kinds = {name: tensor.data_type for name, tensor in stored.items() if name.endswith("_quantized")}
    for name, kind in kinds.items():
        four = stored[name].dims[1] % GROUP == 0 and not name.removesuffix("_quantized").endswith(
            quantisation.EIGHT_BITS
        )
        assert kind == (TensorProto.INT4 if four else TensorProto.INT8), name
    assert set(kinds.values()) == {TensorProto.INT4, TensorProto.INT8}


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
    export_parted(roles_of("lookup", networks)["target"], tmp_path / "target.onnx")
    quantise(tmp_path / "target.onnx", precision)
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


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.2), ("int4", 0.5)])
def test_chains_of_few_bits_give_plain_decoding_s_texts(precision, bound, networks, tmp_path):
    """A tree rounds differently, so policies that verify trees promise less; with a head: runtime/test_same_bits.py."""
    manifest = build(recipe_of("lookup", networks, precision=precision), networks, tmp_path / precision)
    check = manifest.checks["target"]
    assert 1e-3 < check.prompt_error < check.bound == bound
    params, plain = SamplingParams(16, ignore_eos=True), None
    for policy, batch in (("autoregressive", 1), ("autoregressive", 3), ("goodput-exact", 3), ("goodput", 1)):
        llm = LLM(tmp_path / precision, "autoregressive", batch)
        if policy != "autoregressive":
            llm.loop.planner = goodput_planner(llm, SPECULATION_PAYS, policy)
        texts = [completion.token_ids for completion in llm.generate(PROMPTS, params)]
        assert (llm.counters.drafted_tokens > 0) == (policy != "autoregressive")
        plain = plain or texts
        assert texts == plain, (policy, batch)
