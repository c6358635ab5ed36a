"""A rank's graphs as TensorRT takes them, with its own collective operator."""

import onnx
import pytest
from models.checkpoints import qwen3, qwen3_moe
from onnx import helper
from pairs import SIZES

from echo_trt.backends.onnx_export import export, in_precision
from echo_trt.backends.tensorrt.graph import check_graph, name_collectives
from echo_trt.backends.tensorrt.library import logger_of
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.ranks import Shard
from echo_trt.models.roles import TargetModule
from echo_trt.models.weights import load_decoder
from super_tree_attention.tensorrt_plugin import prepare_graph

RANKS = 2
SHAPE = SIZES | {"num_attention_heads": 8, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


def rank_of(make, folder, **sizes) -> TargetModule:
    make(**SHAPE | sizes).save_pretrained(folder / "target")
    return TargetModule(load_decoder(open_checkpoint(folder / "target"), 200, shard=Shard(1, RANKS)), (0, 1, 1))


def collectives(path) -> list[dict]:
    nodes = [n for n in onnx.load(path, load_external_data=False).graph.node if n.op_type == "DistCollective"]
    assert all(node.domain == "" for node in nodes)
    return [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in nodes]


@pytest.mark.parametrize("make", [qwen3, qwen3_moe], ids=["dense", "mixture"])
def test_collectives_are_tensorrts_own(make, tmp_path):
    graph = tmp_path / "rank.onnx"
    extra = {"moe_intermediate_size": 32} if make is qwen3_moe else {}
    export(rank_of(make, tmp_path, **extra), graph)
    assert name_collectives(graph) == 5
    shared = {"nb_rank": RANKS, "group_size": 0, "root": -1}
    summed = {"collective_operation": b"all_reduce", "reduce_op": b"sum"}
    gathered = {"collective_operation": b"all_gather", "reduce_op": b"none"}
    assert collectives(graph) == [shared | summed] * 4 + [shared | gathered]


def test_the_graph_with_the_plugin_has_nothing_that_tensorrt_does_not_know(rtx, tmp_path):
    """By the parser of TensorRT-RTX, which knows the standard operators and the collective one."""
    graph = tmp_path / "rank.onnx"
    export(in_precision(rank_of(qwen3, tmp_path), "bf16"), graph)
    prepare_graph(graph, graph)
    flag = 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = rtx.Builder(logger_of(rtx)).create_network(flag)
    parser = rtx.OnnxParser(network, logger_of(rtx))
    with pytest.raises(Exception, match=r"operator echo::AllReduce is not one that TensorRT compiles"):
        check_graph(graph, parser.supports_operator)
    assert name_collectives(graph) == 5
    check_graph(graph, parser.supports_operator)
