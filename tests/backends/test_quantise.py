"""Weights in 8 and 4 bits: their numbers, and bundles that are built of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from onnx import numpy_helper
from pairs import roles_of

from echo_trt.backends.openvino import graph
from echo_trt.backends.openvino import quantise as quantisation
from echo_trt.backends.openvino.build import compile_role
from echo_trt.backends.openvino.export import export_parted
from echo_trt.backends.openvino.quantise import quantise
from echo_trt.backends.self_check import check_compiled


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
        return ((integers - stored[f"{name}_zero"].astype(np.float32)) * scale).reshape(len(integers), -1)
    if f"{name}_offset" in stored:
        return (integers * scale + stored[f"{name}_offset"][:, :, None]).reshape(len(integers), -1)
    return integers * scale[:, None]


def test_eight_bits_are_within_a_step(networks, tmp_path):
    exact, stored = quantised(networks, tmp_path, "int8")
    matrices = [name for name in exact if f"{name}_quantized" in stored]
    assert len(matrices) == 2 + 3 * 5  # embedding, output, and of each layer qkv, out, gate, up, down
    for name in matrices:
        error = np.abs(dequantised(stored, name) - exact[name])
        assert (error.max(-1) <= 1.01 * np.abs(stored[f"{name}_scale"])).all()
        assert error.max() <= 1.02 * np.abs(exact[name]).max() / 127


def test_four_bits_are_about_half_a_step_off(networks, tmp_path):
    """Of rows that groups divide, in layers. The ends of a group may be clipped by a step more."""
    exact, stored = quantised(networks, tmp_path, "int4")
    four = {name for name in exact if f"{name}_zero" in stored}
    assert len(four) == 3 * 5 == len({name for name in exact if f"{name}_quantized" in stored}) - 2
    for name in four:
        size = 32 if exact[name].shape[1] % 64 else 64
        step = np.repeat(stored[f"{name}_scale"].reshape(len(exact[name]), -1), size, axis=1).astype(np.float32)
        error = np.abs(dequantised(stored, name) - exact[name]) / step
        assert error.max() < 1.6
        assert np.square(error).mean() < 1.2 / 12


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_weights_of_files_in_four_bits_are_kept(kind, networks, tmp_path):
    """And products add their offsets: the compiled network writes the text of the network in fp32."""
    kind, role = GGMLQuantizationType[kind], roles_of("lookup", networks)["target"]
    for name, parameter in role.named_parameters():
        if parameter.dim() == 2 and not name.endswith(quantisation.EIGHT_BITS):
            parameter.data = torch.from_numpy(dequantize(quantize(parameter.detach().numpy(), kind), kind))
    exact, stored = quantised(networks, tmp_path, "int4", role)
    four = {name for name in exact if f"{name}_offset" in stored}
    assert len(four) == 3 * 5
    for name in four:
        assert np.abs(dequantised(stored, name) - exact[name]).max() < 2e-3 * np.abs(exact[name]).max()
    check = check_compiled(role, compile_role(role, tmp_path / "target.onnx", "int4"), "int4")
    assert check.error < 0.03  # of activations in 8 bits; 0.5 and more where weights change


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integers_are_left_to_openvino(precision, networks, tmp_path, monkeypatch):
    """Their conversions are not marked: with the mark, OpenVINO makes them fp32 matrices in memory of its own."""
    monkeypatch.setattr(graph.cpu, "has_amx", lambda: False)  # where small networks' are made bf16
    quantised(networks, tmp_path, precision)
    model = graph.read_graph(tmp_path / "target.onnx")
    graph.compile_graph(model, precision)
    converted = [node for node in model.get_ops() if node.get_type_name() == "Convert" and graph._is_weight(node)]
    assert converted
    assert not any(graph.DECOMPRESSION in node.get_rt_info() for node in converted)
