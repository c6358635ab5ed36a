"""The TensorRT compilers: real TensorRT-RTX engines of tiny networks without a GPU, and every refusal."""

import dataclasses
import importlib.util
import itertools
import multiprocessing
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from models.block_checkpoints import block_raw, write_block
from models.checkpoints import head_config, head_tensors, qwen3_moe, write_head
from pairs import BLOCK, FAMILY_PAIRS, VOCAB, recipe_of, roles_of
from refusal import refused
from stand_ins import built, with_stand_ins

from echo_trt.backends.native_export import export_native, in_precision
from echo_trt.backends.onnx_export import export
from echo_trt.backends.tensorrt import compiler as tensorrt
from echo_trt.backends.tensorrt.compiler import (
    CompileJob,
    check_capabilities,
    compile_engine,
    first_sentence,
    known_capabilities,
)
from echo_trt.backends.tensorrt.graph import check_graph
from echo_trt.backends.tensorrt.library import PLUGINS
from echo_trt.backends.tensorrt.profiles import native_profiles, packed_profiles
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.bundle.manifest import read_manifest, verify_files
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.models.block_weights import load_block
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.roles import BlockModule, HeadModule, TargetModule
from echo_trt.models.weights import load_decoder, load_eagle3
from super_tree_attention.tensorrt_plugin import prepare_graph

rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
SIZES = CallSizes(batch=4, blocks=6, tree=16, chunk=32, pool=24)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
RTX = {"engine": "tensorrt-rtx", "precision": "fp16"}


@pytest.fixture(scope="session")
def with_head(networks, tmp_path_factory):
    """Return a head with heads that TensorRT-RTX has kernels for."""
    config = head_config(vocab_size=VOCAB, hidden_size=64, draft_vocab_size=VOCAB // 2, **HEADS)
    return write_head(tmp_path_factory.mktemp("head") / "head", config, head_tensors(config))


@pytest.fixture(scope="session")
def with_block(networks, tmp_path_factory):
    """Return a block drafter with such heads, too."""
    raw = block_raw("dspark gated", **BLOCK, **HEADS, target_layer_ids=[0, 1], mask_token_id=VOCAB - 1)
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
def graph_of(role_of, tmp_path_factory):
    """network, precision -> its native graph."""
    folder = tmp_path_factory.mktemp("native")

    def get(network, precision="fp16"):
        path = folder / f"{network}-{precision}.onnx"
        if not path.exists():
            export_native(role_of(network), path, precision, SIZES.cache_rows)
        return path

    return get


def job(graph, folder, capabilities=("8.9",)) -> CompileJob:
    profiles = native_profiles(graph, SIZES)
    return CompileJob("tensorrt-rtx", graph, profiles, capabilities, folder / "timings", folder / "log")


# -- engines -------------------------------------------------------------------------------------------------------


@rtx
def test_a_target_compiles_in_bf16(graph_of, tmp_path):
    """Other roles, in fp16, are compiled for bundles."""
    graph, shares = graph_of("target", "bf16"), []
    compile_engine(job(graph, tmp_path), tmp_path / "engine", lambda share, phase: shares.append((share, phase)))
    weights = graph.with_name(graph.name + ".data").stat().st_size
    assert (tmp_path / "engine").stat().st_size > weights
    assert "Engine generation completed" in (tmp_path / "log").read_text()
    assert all(0 <= share <= 1 for share, _ in shares)
    assert shares[-1][0] > 0.8
    assert len({phase for _, phase in shares}) > 3


@rtx
@pytest.mark.parametrize("capabilities", [["8.0", "8.9", "12.0"], ["7.5"]])
def test_experts_compile_for_several_cards(capabilities, graph_of, tmp_path):
    compile_engine(job(graph_of("experts"), tmp_path, capabilities), tmp_path / "engine")
    assert (tmp_path / "engine").stat().st_size > 10_000


@rtx
@pytest.mark.parametrize("kind", ["eagle3", "block"])
def test_a_bundle(kind, networks, with_head, with_block, tmp_path):
    draft = {"kind": kind, "source": {"path": str(with_head if kind == "eagle3" else with_block)}, "top_k": 5}
    recipe = recipe_of("model", networks, draft=draft, compute_capability=["8.0", "12.0"], **RTX)
    stages, shares = [], []
    build(recipe, networks, tmp_path / "bundle", stages.append, lambda share, phase: shares.append((share, phase)))
    manifest = read_manifest(tmp_path / "bundle")
    verify_files(tmp_path / "bundle", manifest)
    assert manifest.tensorrt.capabilities == ["8.0", "12.0"]
    assert manifest.tensorrt.version == sys.modules["tensorrt_rtx"].__version__
    assert {"target.engine", "draft.engine", "tensorrt.log"} <= set(manifest.files)
    assert not any(".onnx" in name for name in manifest.files)  # the engines have the weights
    assert stages[2:4] == ["compiling the target", "compiling the draft"]
    for role in ("target", "draft"):  # two bytes per weight
        size = (tmp_path / "bundle" / f"{role}.engine").stat().st_size
        assert size > 2 * getattr(manifest, role).parameters
    assert all(0 <= share <= 1 for share, _ in shares)
    assert len({phase for _, phase in shares}) > 3
    log = (tmp_path / "bundle" / "tensorrt.log").read_text()
    assert log.count("Engine generation completed") == 2
    if not torch.cuda.is_available():
        assert {check.of for check in manifest.checks.values()} == {"graph"}
        assert all(0 < max(c.prompt_error, c.tree_error) < 0.02 for c in manifest.checks.values())
        with refused("no CUDA device", "NVIDIA GPU", "--engine openvino"):
            LLM(tmp_path / "bundle")


@rtx
@pytest.mark.parametrize("family", FAMILY_PAIRS)
def test_a_family_compiles_and_its_graph_is_checked(family, networks, tmp_path):
    manifest = build(recipe_of(family, networks, draft={"kind": "lookup"}, **RTX), networks, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "target.engine").stat().st_size > 2 * manifest.target.parameters
    assert 0 < manifest.checks["target"].tree_error < 0.02


@rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so that the engine is checked")
def test_what_could_not_be_checked_has_no_check(networks, tmp_path):
    manifest = build(recipe_of("lookup", networks, engine="tensorrt-rtx", precision="bf16"), networks, tmp_path / "b")
    assert manifest.checks == {}
    assert manifest.tensorrt.capabilities == [c for c in known_capabilities("tensorrt-rtx") if c != "7.5"]


@rtx
def test_an_interrupt_ends_the_build_and_a_failing_display_is_an_error(graph_of, tmp_path):
    """Neither is an abort."""
    in_a_process(_interrupted_and_failing, graph_of("target"), tmp_path)


def _interrupted_and_failing(graph, folder):
    _interrupted(graph, folder)
    _failing(graph, folder)


def _interrupted(graph, folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    phases = []

    def interrupt(share, phase):
        phases.append(phase)
        if len(phases) == 30:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        compile_engine(job(graph, folder), folder / "engine", interrupt)
    assert not (folder / "engine").exists()
    interrupted = len(phases)
    compile_engine(job(graph, folder), folder / "engine", lambda share, phase: phases.append(phase))
    assert interrupted < (len(phases) - interrupted)


def _failing(graph, folder):
    def fail(share, phase):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compile_engine(job(graph, folder), folder / "engine", fail)


def in_a_process(check, *arguments):
    """Run ``check`` apart: a cancelled build beside other runtimes' threads has ended the whole process."""
    process = multiprocessing.get_context("spawn").Process(target=check, args=arguments)
    process.start()
    process.join(600)  # seconds on a quiet machine
    assert process.exitcode == 0


# -- refusals of the compiler --------------------------------------------------------------------------------------


@rtx
def test_no_kernel_for_the_attention(graph_of, tmp_path):
    with refused("could not build one head-fp16", "no attention kernel", "another precision"):
        compile_engine(job(graph_of("one head"), tmp_path), tmp_path / "engine")
    assert "ERROR" in (tmp_path / "log").read_text()
    assert not (tmp_path / "engine").exists()


@rtx
def test_a_warning_that_is_not_known_to_be_harmless(graph_of, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "HARMLESS", tensorrt.HARMLESS[1:])
    with refused("warned while reading", "Make sure input token_ids has Int64 binding", "no engine was built"):
        compile_engine(job(graph_of("target"), tmp_path), tmp_path / "engine")


def test_such_a_warning_stops_no_build_whose_engine_is_checked_on_the_card(tmp_path):
    parser = SimpleNamespace(parse_from_file=lambda path: True)
    logger = SimpleNamespace(forget=lambda: None, warnings=lambda: ["This is new."])
    compiler = tensorrt.COMPILERS["tensorrt"]
    unchecked = CompileJob("tensorrt", tmp_path / "graph.onnx", [], [], tmp_path / "timings", tmp_path / "log")
    tensorrt._parse(parser, dataclasses.replace(unchecked, checked=True), logger, compiler)
    with refused("warned while reading", "This is new", "no engine was built"):
        tensorrt._parse(parser, unchecked, logger, compiler)


@rtx
@pytest.mark.parametrize("wanted", ["9.0", "8.7", "banana"])
def test_a_card_that_the_compiler_does_not_know(wanted):
    with refused(f"compute_capability is {wanted}", "7.5, 8.0, 8.6, 8.9, 12.0", "--engine tensorrt"):
        check_capabilities("tensorrt-rtx", ["8.9", wanted])


def test_tensorrt_builds_for_the_card_it_runs_on():
    check_capabilities("tensorrt", [])
    with refused("compute_capability is 8.9", "builds for the card it runs on", "--engine tensorrt-rtx"):
        check_capabilities("tensorrt", ["8.9"])


@rtx
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "fp32"}, ("precision is 'fp32'", "no attention kernel", "use fp16 or bf16")),
        ({"precision": "int8"}, ("precision is 'int8'", "use fp16 or bf16")),
        (
            {"precision": "fp16", "draft": {"kind": "lookup", "precision": "fp32"}},
            ("draft.precision is 'fp32'", "use fp16 or bf16"),
        ),
        ({"precision": "fp16", "compute_capability": ["9.0"]}, ("compute_capability is 9.0", "8.9")),
    ],
    ids=["fp32", "int8", "draft", "capability"],
)
def test_recipes_that_it_cannot_build_are_refused_before_anything_is_read(changes, words, networks, tmp_path):
    def progress(stage):
        raise AssertionError(stage)

    with refused("TensorRT-RTX", *words):
        build(recipe_of("lookup", networks, engine="tensorrt-rtx", **changes), networks, tmp_path / "b", progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("engine", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_no_compiler(engine, extra, networks, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, tensorrt.COMPILERS[engine].module, None)
    with refused(
        "is not installed", f"pip install -e '.[{extra}]'", "echo-trt build the bundle with --engine openvino"
    ):
        build(recipe_of("lookup", networks, engine=engine, precision="fp16"), networks, tmp_path / "b")


@pytest.mark.parametrize("engine", tensorrt.COMPILERS)
def test_another_major_version(engine, monkeypatch):
    module = type(sys)("other")
    module.__version__ = "99.1.2"
    monkeypatch.setitem(sys.modules, tensorrt.COMPILERS[engine].module, module)
    with refused("is version 99.1.2", f"needs version {tensorrt.COMPILERS[engine].major}", "pip install"):
        tensorrt.load_compiler(engine)


def test_cards_are_not_for_cpus(networks, tmp_path):
    with refused("compute_capability is 8.9", "openvino is compiled for no card", "--engine tensorrt-rtx"):
        build(recipe_of("lookup", networks, compute_capability=["8.9"]), networks, tmp_path / "b")


def test_another_engine_takes_the_recipe_but_not_its_drafts_precision(networks):
    recipe = recipe_of("model", networks, precision="bf16")
    recipe = recipe.model_copy(update={"draft": recipe.draft.model_copy(update={"precision": "int8"})})
    other = recipe.built_as("tensorrt-rtx", None, ["8.9"])
    assert (other.engine, other.precision, other.draft.precision) == ("tensorrt-rtx", "bf16", None)
    assert other.compute_capability == ["8.9"]
    same = recipe.built_as("openvino", "fp32", [])
    assert (same.precision, same.draft.precision, same.compute_capability) == ("fp32", "int8", [])


def test_a_word_of_the_compiler_is_the_end_of_a_sentence():
    output = (
        "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([graph.h:1295: attach] Some thing failed. (See x))"
    )
    assert first_sentence([output, "later"]) == "Some thing failed"
    assert first_sentence(["ModelImporter.cpp:140: Two words\nand more"]) == "Two words and more"
    assert first_sentence([]) == "it does not say why"


# -- profiles ------------------------------------------------------------------------------------------------------


def test_packed_profiles_are_next_to_each_other(networks, tmp_path):
    role = roles_of("eagle3", networks)["draft"]
    export(role, tmp_path / "head.onnx")
    prepare_graph(tmp_path / "head.onnx", tmp_path / "head.onnx")
    check_graph(tmp_path / "head.onnx", lambda name: True, PLUGINS, "TensorRT")
    profiles = packed_profiles(tmp_path / "head.onnx", CallSizes(64, 66, 64, 256, 1024))
    ranges = [(p["token_ids"][0][0], p["token_ids"][2][0]) for p in profiles]
    assert ranges[0] == (1, 32)
    assert all(maximum + 1 == minimum for (_, maximum), (minimum, _) in itertools.pairwise(ranges))
    assert ranges[-1][1] >= 1024 + 256
    for profile in profiles:
        assert profile["seq_begins"][2][0] == profile["past_lens"][2][0] + 1
        assert profile["key_cache.0"] == ((1, 3, 32, 8), (1024, 3, 32, 8), (1024, 3, 32, 8))
        assert profile["features"][0][0] == profile["tree_mask"][0][0] == 0
        # A level's rows see their request's whole tree: 64 bytes a row, of the smallest profile too.
        assert 4 * profile["tree_mask"][2][0] >= profile["token_ids"][2][0] * 64
        usual = {name: shapes[1][0] for name, shapes in profile.items()}
        assert usual["features"] + usual["hidden"] == usual["token_ids"]  # or TensorRT refuses the profile
        # All requests may have the same long beginning, whose blocks each of them names.
        assert profile["block_indices"][2][0] >= profile["past_lens"][2][0] * 66


@rtx
@pytest.mark.parametrize("network", ["target", "head", "block", "experts"])
def test_every_packed_profile_is_taken_by_the_compiler(network, role_of, tmp_path):
    """TensorRT refuses a profile whose usual sizes break a graph's own constraints, such as M + P = N of a head."""
    api = tensorrt.load_compiler("tensorrt-rtx")
    graph, stand_ins = tmp_path / "graph.onnx", tmp_path / "stand_ins.onnx"
    export(in_precision(role_of(network), "fp16"), graph)
    prepare_graph(graph, graph)
    with_stand_ins(graph, stand_ins)
    logger = tensorrt.logger_of(api)
    for profile in packed_profiles(graph, SIZES):
        logger.forget()
        assert built(stand_ins, profile, api, logger), logger.errors()
