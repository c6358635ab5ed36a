"""A build for TensorRT without its libraries: what it registers, refuses and leaves on the card."""

import importlib
import sys
import weakref
from functools import partial

from pairs import recipe_of, roles_of
from refusal import refused

from echo_trt.backends.cuda import device
from echo_trt.backends.kind import CompiledRole
from echo_trt.backends.self_check import check_compiled
from echo_trt.backends.tensorrt import build as tensorrt_build
from echo_trt.backends.tensorrt import library
from echo_trt.backends.tensorrt.engine import TensorRTEngine
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.bundle.call_sizes import CallSizes


def test_who_loads_tensorrt_has_the_plugin_registered(monkeypatch):
    """The parser of a build asks for it, and so does TensorRT when it loads an engine."""
    registered = []
    module = type(sys)("tensorrt")
    module.__version__ = f"{library.MAJOR}.4.0"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(library, "register", lambda: registered.append(True))
    assert library.load_tensorrt() is module
    assert registered == [True]
    monkeypatch.setattr(library, "register", lambda: importlib.import_module("what_is_not_there"))
    with refused("the plugin for TensorRT cannot be loaded (No module named 'what", "pip install -e '.[tensorrt]'"):
        library.load_tensorrt()


def test_heads_that_the_kernel_does_not_have_are_refused_before_the_export(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "HEAD_DIMS", (64, 128))
    recipe = recipe_of("lookup", networks, engine="tensorrt", precision="fp16")
    build = tensorrt_build.TensorRTBuild(recipe, tmp_path, tmp_path / "timings", lambda share, phase: None)
    with refused("the network has heads of", "64, 128 and up to 16", "--engine cpu"):
        build.compile(roles_of("lookup", networks)["target"], "target", "fp16")
    assert list(tmp_path.iterdir()) == []


def test_a_checked_engine_is_gone_before_the_next_network_is_built(networks, tmp_path, monkeypatch):
    """Its weights may be most of the card's memory. It has the check's few blocks, and graphs of the check's calls."""
    role, gone = roles_of("lookup", networks)["target"], []

    def opened(file, facts, slots, blocks, num_blocks, prepare=True):
        assert not prepare
        assert num_blocks == 4 < CallSizes.of(recipe).pool
        engine = TorchEngine(roles_of("lookup", networks)["target"], num_blocks)
        weakref.finalize(engine, gone.append, True)
        return engine

    monkeypatch.setattr(TensorRTEngine, "open", opened)
    monkeypatch.setattr(tensorrt_build.TensorRTBuild, "facts", lambda self: None)
    recipe = recipe_of("lookup", networks, engine="tensorrt", precision="fp16")
    build = tensorrt_build.TensorRTBuild(recipe, tmp_path, tmp_path / "timings", lambda share, phase: None)
    compiled = CompiledRole("target.engine", partial(build.open, tmp_path / "target.engine", CallSizes.of(recipe)))
    assert check_compiled(role, compiled, "fp16")
    assert gone


def test_a_card_that_has_no_kernel():
    for capability in ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1"):
        tensorrt_build.check_card(capability)
    with refused("compute capability 7.5", "needs 8.0", "newer card"):
        tensorrt_build.check_card("7.5")
