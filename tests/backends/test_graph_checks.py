"""Graphs that TensorRT would refuse, or die of, are refused before its parser sees them."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from refusal import refused

from echo_trt.backends.tensorrt.graph import check_graph


def small_graph(mask=TensorProto.FLOAT16, attributes=None):
    """One attention over a cache, in standard operators."""
    half = TensorProto.FLOAT16
    inputs = [
        helper.make_tensor_value_info("query", half, ["b", 2, "t", 16]),
        helper.make_tensor_value_info("rows", half, ["b", 2, "t", 16]),
        helper.make_tensor_value_info("mask", mask, ["b", 1, "t", 64]),
        helper.make_tensor_value_info("past", TensorProto.INT64, ["b"]),
        helper.make_tensor_value_info("cache", half, ["b", 2, 64, 16]),
    ]
    nodes = [
        helper.make_node("TensorScatter", ["cache", "rows", "past"], ["new_cache"], axis=2, **attributes or {}),
        helper.make_node("Attention", ["query", "new_cache", "new_cache", "mask"], ["attended"], "attention"),
        helper.make_node("Identity", ["attended"], ["output"]),
    ]
    outputs = [
        helper.make_tensor_value_info("output", half, ["b", 2, "t", 16]),
        helper.make_tensor_value_info("new_cache", half, ["b", 2, 64, 16]),
    ]
    graph = helper.make_graph(nodes, "small", inputs, outputs)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("echo", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def with_node(*words, **options):
    return lambda model: model.graph.node.append(helper.make_node(*words, **options))


def hidden_in_a_branch(model):
    branch = helper.make_graph([helper.make_node("Mystery", [], ["x"], domain="other")], "branch", [], [])
    with_node("If", ["past"], ["extra"], then_branch=branch, else_branch=branch)(model)


def computed_bool_mask(model):
    model.graph.initializer.append(numpy_helper.from_array(np.float16(0), "zero"))
    model.graph.node.insert(0, helper.make_node("Less", ["mask", "zero"], ["seen"]))
    model.graph.node[2].input[3] = "seen"


CHANGES = [
    (
        with_node("SuperTreeAttention", ["attended"], ["extra"], domain="other"),
        ("operator other::SuperTreeAttention", "--engine cpu"),
    ),
    (with_node("StringNormalizer", ["attended"], ["extra"]), ("operator StringNormalizer",)),
    (hidden_in_a_branch, ("operator other::Mystery",)),
    (lambda m: m.graph.node[1].output.append("present"), ("Attention attention has more than one output",)),
    (lambda m: m.graph.node[1].input.extend(["", "", "past"]), ("Attention attention has inputs beyond its mask",)),
    (lambda m: m.CopyFrom(small_graph(attributes={"mode": "circular"})), ("is not linear",)),
    (lambda m: m.CopyFrom(small_graph(TensorProto.BOOL)), ("bool mask", "added to the scores")),
    (computed_bool_mask, ("bool mask", "added to the scores")),
    (
        lambda m: m.graph.input.append(helper.make_tensor_value_info("spare", TensorProto.INT64, ["b"])),
        ("input spare is not used",),
    ),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_graphs_that_are_refused_before_the_parser_sees_them(change, words, tmp_path):
    model, path = small_graph(), tmp_path / "graph.onnx"

    def check():
        onnx.save(model, path)
        check_graph(path, lambda name: name != "StringNormalizer")

    check()
    change(model)
    with refused(path, *words):
        check()
