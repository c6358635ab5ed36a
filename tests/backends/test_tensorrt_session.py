"""A TensorRT engine's session without a card: its contexts, and that it asks nothing that TensorRT does not know."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from echo_trt.backends.tensorrt.session import Session


def test_what_a_session_asks_of_tensorrt_is_there():
    """Where its libraries are missing its bindings still tell what an engine and a context have."""
    bindings = importlib.util.find_spec("tensorrt_bindings")
    if bindings is None:
        pytest.skip("TensorRT's bindings are not installed")
    library = next(Path(bindings.origin).parent.glob("tensorrt*.so")).read_bytes()
    requested = set(re.findall(r"\b(?:context|_engine|_runtime|settings)\.(\w+)", inspect.getsource(Session)))
    assert {"set_communicator", "execute_async_v3", "get_tensor_profile_shape"} <= requested
    assert [name for name in sorted(requested) if name.encode() not in library] == []


class Context:
    """An execution context that is told what it would compute."""

    def __init__(self):
        self.shapes, self.profiles = {}, []

    def set_device_memory(self, address, size):
        pass

    def set_optimization_profile_async(self, profile, stream):
        self.profiles.append(profile)
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True


@pytest.fixture
def session(monkeypatch):
    """Return a session of two profiles, whose contexts compute nothing."""
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    session = Session.__new__(Session)
    session.device, session._communicator = torch.device("cpu"), None
    session._contexts, session._in_graphs = {}, {}
    session._profiles = [{"a": ((1,), (16,))}, {"a": ((17,), (900,))}]
    session._scratch, session._settings = torch.empty(1), None
    session._engine = SimpleNamespace(create_execution_context=lambda settings: Context())
    return session


def test_contexts_are_one_a_size_that_recurs_and_one_a_profile_for_others(session):
    small = [session._context({"a": (n,)}) for n in (4, 8, 4)]
    assert small[0] is small[2] is not small[1]
    assert [context.shapes for context in small] == [{"a": (4,)}, {"a": (8,)}, {"a": (4,)}]
    for n in range(600, 800):
        large = session._context({"a": (n,)}, recurs=False)
        assert large.shapes == {"a": (n,)}
        assert large.profiles == [1]
    assert len(session._contexts) == 3


def test_a_context_in_a_graph_is_that_graphs_alone(session, monkeypatch):
    """A graph may launch a size several times; of two levels' graphs, each has contexts of its own."""
    used = []
    for _ in range(2):
        warm = session._context({"a": (4,)})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert [session._context({"a": (4,)}) for _ in range(2)] == [warm] * 2
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        used.append(warm)
    launched = session._context({"a": (4,)})
    assert launched is session._context({"a": (4,)})
    assert len({id(context) for context in (*used, launched)}) == 3
