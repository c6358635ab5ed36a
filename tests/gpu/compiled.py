"""Engines that TensorRT builds on this card, of random networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.bundle.recipe import Recipe


def skip_without_tensorrt(card: Any) -> None:
    """Skip a test where TensorRT cannot build for this card."""
    if card.device.type != "cuda":
        pytest.skip("TensorRT runs on a card alone")
    for module in ("tensorrt", "onnxscript"):
        try:
            __import__(module)
        except Exception as error:  # a wheel without its libraries fails in ways of its own
            pytest.skip(f"{module} cannot be used here ({error})")


class Built:
    """A compiler's build of a recipe's networks, in a folder."""

    def __init__(self, recipe: Recipe, folder: Path):
        from echo_trt.backends.tensorrt.build import TensorRTBuild

        self.recipe, self.sizes = recipe, CallSizes.of(recipe)
        self.build = TensorRTBuild(recipe, folder, folder / "timings", lambda share, phase: None)

    def opened(self, role: Any, name: str, kind: Any = None) -> tuple[Any, Any]:
        """Build a role; return its engine, of the class ``kind`` or ``TensorRTEngine``, and the self-check."""
        from echo_trt.backends.self_check import check_engine
        from echo_trt.backends.tensorrt.engine import TensorRTEngine

        precision = self.recipe.precision
        compiled = self.build.compile(role, name, precision)
        check = compiled.open and check_engine(role, compiled.open, precision, longest=compiled.longest)
        path, sizes, facts = self.build.folder / compiled.file, self.sizes, self.build.facts()
        opened = (kind or TensorRTEngine).open(path, facts, sizes.batch, sizes.blocks, sizes.pool, tree=sizes.tree)
        return opened, check


def assert_caches_are_not_copied(session: Any, figures: Any) -> None:
    """Check that caches are not copied, by the layers that the engine tells of."""
    try:
        inspector = session._engine.create_engine_inspector()
        text = inspector.get_engine_information(session._api.LayerInformationFormat.JSON)
    except Exception as error:
        figures(layers=f"not told: {error}")
        return
    named = [layer for layer in map(str, json.loads(text).get("Layers", [])) if "_cache." in layer]
    figures(layers_that_name_a_cache=len(named))
    assert named  # engines are built to tell of their layers
    assert not [layer for layer in named if "Reformat" in layer or "copy" in layer.lower()]
