"""The layers of the tests: which folder has which, and what the pure one does without."""

from __future__ import annotations

from pathlib import Path

#: Folder or file of tests/ -> its layer; what is not named is "engine". pyproject.toml describes the layers.
LAYERS = {
    "decoding": "pure",
    "files": "pure",
    "grammar": "pure",
    "pictures": "pure",
    "simulation": "pure",
    "test_docs.py": "pure",
    "test_layers.py": "pure",
    "plugins": "kernel",
    "dynamo": "server",
    "examples": "server",
    "gateway": "server",
    "launch": "server",
    "serving": "server",
}
#: What a pure test may not import.
HEAVY = {"onnx", "onnxruntime", "openvino", "tensorrt", "torch", "transformers", "triton"}


def layer(path: Path) -> str:
    """Name the layer of a file or folder in tests/."""
    return LAYERS.get(path.relative_to(Path(__file__).parent).parts[0], "engine")
