"""The layers of the tests: which folder has which, and what the pure one does without."""

from __future__ import annotations

from pathlib import Path

#: Folder or file of tests/ -> its layer; what is not named is "engine". pyproject.toml describes the layers.
LAYERS = {
    "speculation": "pure",
    "files": "pure",
    "grammar": "pure",
    "lab": "pure",
    "lab/benchmark": "engine",
    "lab/calibration": "engine",
    "lab/sizing": "engine",
    "lab/test_ablations.py": "engine",
    "lab/test_device_counts.py": "engine",
    "lab/test_images.py": "engine",
    "lab/test_lossless_script.py": "engine",
    "lab/test_race.py": "engine",
    "lab/test_random_weights.py": "engine",
    "lab/test_synthetic_text.py": "engine",
    "lab/test_replayed.py": "engine",
    "lab/test_side_by_side.py": "engine",
    "lab/test_train_eagle3.py": "engine",
    "test_docs.py": "pure",
    "test_layers.py": "pure",
    "test_words.py": "pure",
    "gpu": "gpu",
    "plugins": "kernel",
    "adapters": "server",
    "examples": "server",
    "engine/test_text.py": "pure",
    "engine/service": "server",
    "server": "server",
    "supervision": "server",
}
#: What a pure test may not import.
HEAVY = {"onnx", "onnxruntime", "openvino", "tensorrt", "torch", "transformers", "triton"}


def layer(path: Path) -> str:
    """Name the layer of a file or folder in tests/."""
    index = path.relative_to(Path(__file__).parent)
    named = (LAYERS.get(str(folder)) for folder in (index, *index.parents))
    return next(filter(None, named), "engine")


def has_pure(path: Path) -> bool:
    """Say whether a file or folder in tests/ is of the pure layer, or has files that are."""
    below = (kind for name, kind in LAYERS.items() if path in (Path(__file__).parent / name).parents)
    return "pure" in (layer(path), *below)
