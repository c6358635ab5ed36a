"""Graphs that this run has traced before: a network is traced once, by whichever process comes first.

A trace takes seconds, and dozens of bundles and engines here are of the same few networks. Its key is all that it
depends on: the network with its weights, and the inputs that it is traced on. PyTorch's table of translations, which
the exporter makes anew for each trace, is made once a process and copied.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir
import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.utils._pytree import tree_flatten

from echo_trt.backends import onnx_export

ADDRESS = re.compile(" at 0x[0-9a-f]+")  # of functions in a table of translations


def digest(graph: nn.Module, example: tuple, *others: object) -> str:
    leaves, structure = tree_flatten(example)
    found = hashlib.sha256(ADDRESS.sub("", repr((structure, others))).encode())
    for fact in (*_facts(graph), *map(_described, leaves)):
        found.update(fact)
    return found.hexdigest()


def _facts(graph: nn.Module) -> Iterator[bytes]:
    """Its modules' classes and attributes, and its weights; of a weight in two places, where it was first."""
    usual, first = vars(nn.Module()).keys(), {}
    for name, module in graph.named_modules():
        own = sorted((key, repr(value)) for key, value in vars(module).items() if key not in usual)
        yield repr((name, type(module), own)).encode()
    for tensors in (graph.named_parameters, graph.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            yield f"{name} {first.setdefault(id(tensor), name)} ".encode() + _described(tensor)


def _described(tensor: Tensor) -> bytes:
    numbers = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + numbers


def trace_once(patch: pytest.MonkeyPatch, made_once: Callable[[str, Callable[[Path], object]], Path]) -> None:
    """Let the exporter take a graph that was traced before from its file."""
    trace = onnx_export.trace

    def traced(graph: nn.Module, example: tuple, *others: object, **named: object) -> torch.onnx.ONNXProgram:
        def write(folder: Path) -> None:
            folder.mkdir()
            trace(graph, example, *others, **named).save(folder / "graph.onnx", external_data=True)

        folder = made_once(f"graph-{digest(graph, example, others, named)}", write)
        return torch.onnx.ONNXProgram(onnx_ir.load(folder / "graph.onnx"), None)

    patch.setattr(onnx_export, "trace", traced)
    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(_translations))


def _translations(opset_version: int) -> ONNXRegistry:
    """Return a registry of its own for a trace, which adds the custom operators."""
    registry = copy.copy(_made_translations(opset_version))
    registry.functions = {target: list(known) for target, known in registry.functions.items()}
    return registry


_made_translations = functools.cache(ONNXRegistry.from_torchlib)
