"""The TensorRT compiler: real builds of tiny networks without a GPU, and every refusal."""

import dataclasses
import importlib.util
import multiprocessing
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
from models.block_checkpoints import block_raw, write_block
from models.checkpoints import head_config, head_tensors, qwen3_moe, write_head
from pairs import BLOCK, VOCAB, recipe_of, roles_of
from refusal import refused
from stand_ins import built, with_stand_ins

from echo_trt.backends.kind import built_as
from echo_trt.backends.onnx_export import export, in_precision
from echo_trt.backends.tensorrt import compiler as tensorrt
from echo_trt.backends.tensorrt.compiler import CompileJob
from echo_trt.backends.tensorrt.library import logger_of
from echo_trt.backends.tensorrt.profiles import packed_profiles
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.cli.build import build
from echo_trt.models.block_weights import load_block
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.roles import BlockModule, HeadModule, TargetModule
from echo_trt.models.weights import load_decoder, load_eagle3
from super_tree_attention.tensorrt_plugin import prepare_graph

rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
SIZES = CallSizes(batch=4, blocks=6, tree=16, chunk=32, pool=24)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(scope="session")
def with_head(networks, tmp_path_factory):
    """Return a head with heads that TensorRT-RTX has kernels for."""
    config = head_config(vocab_size=VOCAB, hidden_size=64, draft_vocab_size=VOCAB // 2, **HEADS)
    return write_head(tmp_path_factory.mktemp("head") / "head", config, head_tensors(config))


@pytest.fixture(scope="session")
def with_block(networks, tmp_path_factory):
    """Return a block drafter with such heads, too."""
    raw = block_raw("dspark", **BLOCK, **HEADS, target_layer_ids=[0, 1], mask_token_id=VOCAB - 1)
    return write_block(tmp_path_factory.mktemp("block") / "drafter", raw)


@pytest.fixture(scope="session")
def role_of(networks, with_head, with_block, tmp_path_factory):
    """network -> its role."""
    folder = tmp_path_factory.mktemp("roles")

    def get(network):
        if network == "experts":
            qwen3_moe(vocab_size=VOCAB, num_hidden_layers=2, mlp_only_layers=[0], **HEADS).save_pretrained(
                folder / "moe"
            )
            return TargetModule(load_decoder(open_checkpoint(folder / "moe"), 64))
        if network == "one head":
            return roles_of("close", networks)["draft"]
        if network == "head":
            target = load_decoder(open_checkpoint(networks / "target"), 192)
            return HeadModule(load_eagle3(open_checkpoint(with_head), 192, target), 5)
        if network.startswith("block"):
            target = load_decoder(open_checkpoint(networks / "target"), 192)
            return BlockModule(load_block(open_checkpoint(with_block), 192, target), 5)
        return roles_of("model" if network == "draft" else "eagle3", networks)[network]

    return get


@pytest.fixture(scope="session")
def stand_ins_of(role_of, tmp_path_factory):
    """network -> its packed graph in fp16, with stand-ins for the plugin, and its profiles."""
    folder = tmp_path_factory.mktemp("packed")

    def get(network):
        graph, stand_ins = folder / f"{network}.onnx", folder / f"{network}.stand_ins.onnx"
        export(in_precision(role_of(network), "fp16"), graph)
        prepare_graph(graph, graph)
        with_stand_ins(graph, stand_ins)
        return stand_ins, packed_profiles(graph, SIZES)

    return get


# -- builds, by TensorRT-RTX's compiler, which needs no GPU --------------------------------------------------------


@rtx
@pytest.mark.parametrize("network", ["target", "head", "block", "experts"])
def test_every_packed_profile_is_taken_by_the_compiler(network, stand_ins_of):
    """TensorRT refuses a profile whose usual sizes break a graph's own constraints, such as M + P = N of a head."""
    api, (graph, profiles), shares = importlib.import_module("tensorrt_rtx"), stand_ins_of(network), []
    logger = logger_of(api)
    for profile in profiles:
        logger.forget()
        assert built(graph, profile, api, logger, lambda *told: shares.append(told)), logger.errors()
    assert all(0 <= share <= 1 for share, _ in shares)
    assert len({phase for _, phase in shares}) > 3


@rtx
def test_an_interrupt_ends_the_build_and_a_failing_display_is_an_error(stand_ins_of):
    """Neither is an abort."""
    graph, profiles = stand_ins_of("target")
    in_a_process(_interrupted_and_failing, graph, profiles[0])


def _interrupted_and_failing(graph, profile):
    api = importlib.import_module("tensorrt_rtx")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    phases = []

    def interrupt(share, phase):
        phases.append(phase)
        if len(phases) == 30:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def fail(share, phase):
        raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt):
        built(graph, profile, api, logger_of(api), interrupt)
    interrupted = len(phases)
    assert built(graph, profile, api, logger_of(api), lambda share, phase: phases.append(phase))
    assert interrupted < (len(phases) - interrupted)
    with pytest.raises(ZeroDivisionError):
        built(graph, profile, api, logger_of(api), fail)


def in_a_process(check, *arguments):
    """Run ``check`` apart: a cancelled build beside other runtimes' threads has ended the whole process."""
    process = multiprocessing.get_context("spawn").Process(target=check, args=arguments)
    process.start()
    process.join(600)  # seconds on a quiet machine
    assert process.exitcode == 0


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_warning_that_is_new_stops_a_build_whose_engine_is_not_checked_on_the_card(tmp_path):
    parser = SimpleNamespace(parse_from_file=lambda path: True)
    messages = ["Make sure input token_ids has Int64 binding"]
    logger = SimpleNamespace(forget=lambda: None, warnings=lambda: messages)
    unchecked = CompileJob(tmp_path / "graph.onnx", [], tmp_path / "timings", tmp_path / "log")
    tensorrt._parse(parser, unchecked, logger)
    messages.append("This is new.")
    tensorrt._parse(parser, dataclasses.replace(unchecked, checked=True), logger)
    with refused("warned while reading", "This is new", "no engine was built"):
        tensorrt._parse(parser, unchecked, logger)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "fp32"}, ("precision is 'fp32'", "use one of fp16, bf16")),
        ({"precision": "int8"}, ("precision is 'int8'", "use one of fp16, bf16")),
        (
            {"precision": "fp16", "draft": {"kind": "lookup", "precision": "fp32"}},
            ("draft.precision is 'fp32'", "use one of fp16, bf16"),
        ),
    ],
    ids=["fp32", "int8", "draft"],
)
def test_recipes_that_it_cannot_build_are_refused_before_anything_is_read(changes, words, networks, tmp_path):
    def progress(stage):
        raise AssertionError(stage)

    with refused("tensorrt", *words):
        build(recipe_of("lookup", networks, engine="tensorrt", **changes), networks, tmp_path / "b", progress)
    assert list(tmp_path.iterdir()) == []


def test_no_compiler(networks, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with refused("is not installed", "pip install -e '.[tensorrt]'", "echo-trt build the bundle with --engine cpu"):
        build(recipe_of("lookup", networks, engine="tensorrt", precision="fp16"), networks, tmp_path / "b")


def test_another_engine_takes_the_recipe_but_not_its_drafts_precision(networks):
    recipe = recipe_of("model", networks, precision="bf16")
    recipe = recipe.model_copy(update={"draft": recipe.draft.model_copy(update={"precision": "int8"})})
    other = built_as(recipe, "tensorrt", None)
    assert (other.engine, other.precision, other.draft.precision) == ("tensorrt", "bf16", None)
    same = built_as(recipe, "openvino", "fp32")
    assert (same.precision, same.draft.precision) == ("fp32", "int8")
