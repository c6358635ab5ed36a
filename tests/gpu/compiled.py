"""Engines that TensorRT and TensorRT-RTX build on this card, of random networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.bundle.recipe import Recipe

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def skip_without(engine: str, card: Any) -> None:
    """Skip a test where ``engine`` cannot build for this card."""
    if card.device.type != "cuda":
        pytest.skip(f"{engine} runs on a card alone")
    for module in (MODULES[engine], "onnxscript"):
        try:
            __import__(module)
        except Exception as error:  # a wheel without its libraries fails in ways of its own
            pytest.skip(f"{module} cannot be used here ({error})")
    from echo_trt.backends.cuda.device import compute_capability
    from echo_trt.backends.tensorrt.compiler import COMPILERS, known_capabilities

    capability = compute_capability(card.device)
    if COMPILERS[engine].builds_anywhere and capability not in known_capabilities(engine):
        pytest.skip(f"{engine} builds nothing for compute capability {capability}")


class Built:
    """A compiler's build of a recipe's networks, in a folder."""

    def __init__(self, recipe: Recipe, folder: Path):
        from echo_trt.backends.tensorrt.build import TensorRTBuild

        self.recipe, self.engine, self.sizes = recipe, recipe.engine, CallSizes.of(recipe)
        self.build = TensorRTBuild(recipe, folder, folder / "timings", lambda share, phase: None)

    def opened(self, role: Any, name: str, kind: Any = None) -> tuple[Any, Any]:
        """Build a role; return its engine, of the class ``kind`` or ``TensorRTEngine``, and the self-check."""
        from echo_trt.backends.tensorrt.engine import TensorRTEngine

        file, check = self.build.compile(role, name, self.recipe.precision)
        path, sizes, facts = self.build.folder / file, self.sizes, self.build.facts()
        opened = (kind or TensorRTEngine).open(
            self.engine, path, facts, sizes.batch, sizes.blocks, sizes.pool, tree=sizes.tree
        )
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
    assert named or session._title != "TensorRT"  # whose engines are built to tell of their layers
    assert not [layer for layer in named if "Reformat" in layer or "copy" in layer.lower()]
