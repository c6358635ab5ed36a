"""A target's features in bf16: OpenVINO then keeps what its layers add to in bf16, not in fp32 between conversions."""

import numpy as np
import openvino as ov
import pytest

from echo_trt.backends.openvino.cpu import has_bf16
from echo_trt.backends.openvino.engine import _from_bf16
from echo_trt.backends.openvino.graph import FEATURES, compile_graph, read_graph

needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="needs a CPU with bf16 and AVX-512")


@needs_bf16
def test_layers_are_not_kept_in_fp32(bundle_of):
    compiled = compile_graph(read_graph(bundle_of("close") / "target.onnx"), "bf16")
    assert compiled.output(FEATURES).element_type == ov.Type.bf16
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = [(info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in nodes]
    assert kinds.count(("Eltwise", "bf16")) >= 3
    assert ("Eltwise", "f32") not in kinds


def test_in_fp32_features_are_exact(bundle_of):
    compiled = compile_graph(read_graph(bundle_of("close") / "target.onnx"), "fp32")
    assert compiled.output(FEATURES).element_type == ov.Type.f32


def test_bf16_is_the_first_half_of_float32():
    values = np.array([[1.5, -2.0, 0.0], [3.140625, 1e-30, -65536.0]], np.float32)
    short = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.float16)
    read = _from_bf16(short)
    assert read.dtype == np.float32
    assert read == pytest.approx(values, rel=2**-7)
    assert read[0].tolist() == [1.5, -2.0, 0.0]
