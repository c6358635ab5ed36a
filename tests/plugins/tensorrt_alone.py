"""TensorRT's Python bindings without its libraries: enough to register plugins and to ask them, not to build engines.

The wheel tensorrt-cu13-bindings holds the bindings; the libraries are not on PyPI. Their dozen entry points are put in
their place here, each answering nothing, so that the module can be imported.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
#: The registry is an object with virtual functions; the others are never called.
ENTRY_POINTS = """
#define F(n) virtual long f##n() { return 0; }
#define G(n) F(n##0) F(n##1) F(n##2) F(n##3) F(n##4) F(n##5) F(n##6) F(n##7)
static struct Registry { G(1) G(2) G(3) G(4) } registry;
extern "C" {
void* getPluginRegistry() { return &registry; }
void* getBuilderPluginRegistry() { return &registry; }
void* createInferBuilder_INTERNAL() { return 0; }
void* createInferRefitter_INTERNAL() { return 0; }
void* createInferRuntime_INTERNAL() { return 0; }
void* createNvOnnxParser_INTERNAL() { return 0; }
void* createNvOnnxParserRefitter_INTERNAL() { return 0; }
int getNvOnnxParserVersion() { return 0; }
bool initLibNvInferPlugins() { return true; }
}
"""


def missing() -> str:
    """Why the bindings cannot be loaded; "" if they can."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        return "tensorrt-cu13-bindings is not installed"
    return "" if shutil.which("g++") else "g++, for TensorRT's entry points, is not installed"


def load(folder: Path) -> ModuleType:
    """``tensorrt_bindings``, importable as ``tensorrt`` until ``unload``."""
    if importlib.util.find_spec("tensorrt_libs") is None:
        version = importlib.metadata.version("tensorrt-cu13-bindings").split(".")[0]
        source = folder / "entry_points.cpp"
        source.write_text(ENTRY_POINTS)
        for name in LIBRARIES:
            file = f"lib{name}.so.{version}"
            command = ["g++", "-shared", "-fPIC", "-o", folder / file, f"-Wl,-soname,{file}", source]
            subprocess.run(command, check=True)
            ctypes.CDLL(str(folder / file))  # for whoever needs a library of this name, and for nobody else
    sys.modules["tensorrt"] = importlib.import_module("tensorrt_bindings")
    return sys.modules["tensorrt"]


def unload() -> None:
    """Other tests must not find a TensorRT that can do nothing."""
    for name in [n for n in sys.modules if n == "tensorrt" or n.startswith("tensorrt.")]:
        del sys.modules[name]
