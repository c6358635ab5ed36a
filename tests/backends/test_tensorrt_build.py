"""A build for TensorRT without its libraries: what it registers, refuses and leaves on the card."""

import weakref

import pytest
import torch
from pairs import recipe_of, roles_of
from refusal import refused

from echo_trt.backends.cuda import device
from echo_trt.backends.tensorrt import build as tensorrt_build
from echo_trt.backends.tensorrt import engine as engine_module
from echo_trt.backends.tensorrt import library
from echo_trt.backends.tensorrt.engine import TensorRTEngine
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.bundle.call_sizes import CallSizes


def test_a_build_registers_the_plugins_whoever_calls_it(networks, tmp_path, monkeypatch):
    """The parser finds a plugin only where it was registered before."""

    class Registered(Exception):
        pass

    def register():
        raise Registered

    monkeypatch.setattr(library, "register", register)
    recipe = recipe_of("lookup", networks, engine="tensorrt", precision="fp16")
    build = tensorrt_build.TensorRTBuild(recipe, tmp_path, tmp_path / "timings", lambda share, phase: None)
    with pytest.raises(Registered):
        build.compile(roles_of("lookup", networks)["target"], "target", "fp16")


def test_heads_that_the_kernel_does_not_have_are_refused_before_the_export(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "register", lambda: None)
    monkeypatch.setattr(device, "HEAD_DIMS", (64, 128))
    recipe = recipe_of("lookup", networks, engine="tensorrt", precision="fp16")
    build = tensorrt_build.TensorRTBuild(recipe, tmp_path, tmp_path / "timings", lambda share, phase: None)
    with refused("the network has heads of", "64, 128 and up to 16", "--engine openvino"):
        build.compile(roles_of("lookup", networks)["target"], "target", "fp16")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_registers_the_plugin_before_it_is_loaded(tmp_path, monkeypatch):
    """TensorRT asks Python for the plugin of a compiled network, too."""
    order = []
    monkeypatch.setattr(library, "register", lambda: order.append("registered"))
    monkeypatch.setattr(engine_module, "Session", lambda *_: order.append("loaded"))
    for name in ("check_version", "check_card", "cuda_device", "compute_capability"):
        monkeypatch.setattr(engine_module, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    for engine, wanted in (("tensorrt", ["registered", "loaded"]), ("tensorrt-rtx", ["loaded"])):
        with pytest.raises(AttributeError):  # of an engine that is none
            TensorRTEngine.open(engine, tmp_path, None, 1, 1, 1)
        assert order == wanted
        order.clear()


def test_a_checked_engine_is_gone_before_the_next_network_is_built(networks, tmp_path, monkeypatch):
    """Its weights and its pool may be most of the card's memory."""
    role, gone = roles_of("lookup", networks)["target"], []

    def opened(*_):
        engine = TorchEngine(role, 4)
        weakref.finalize(engine, gone.append, True)
        return engine

    monkeypatch.setattr(TensorRTEngine, "open", opened)
    monkeypatch.setattr(tensorrt_build.TensorRTBuild, "facts", lambda self: None)
    recipe = recipe_of("lookup", networks, engine="tensorrt", precision="fp16")
    build = tensorrt_build.TensorRTBuild(recipe, tmp_path, tmp_path / "timings", lambda share, phase: None)
    build._check_engine(role, tmp_path / "target.engine", "fp16", CallSizes.of(recipe))
    assert gone


def test_a_card_that_has_no_kernel():
    for capability in ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1"):
        tensorrt_build.check_card(capability)
    with refused("compute capability 7.5", "needs 8.0 or more", "--engine tensorrt-rtx"):
        tensorrt_build.check_card("7.5")
