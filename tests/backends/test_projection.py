"""Features that the end of a target's graph combines, as TensorRT's does, draft what features as they are draft."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from pairs import roles_of
from random_calls import Script, inputs_for

from echo_trt.backends.onnx_export import export
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.models.roles import TargetModule, feature_size, projected
from echo_trt.speculation.pack import BLOCK


@pytest.mark.parametrize("pair", ["eagle3", "dflash", "peagle"])
def test_a_projected_draft_proposes_the_same(pair, networks, tmp_path):
    target, draft = (roles_of(pair, networks)[name] for name in ("target", "draft"))
    script = Script(0, np.arange(12).reshape(3, 4))
    call = script.call(np.arange(3), chunks=script.rng.integers(3, BLOCK, 3))
    inputs = inputs_for(draft, call, script.rng)
    count, tokens = len(inputs["features"]), len(call.token_ids)
    inputs["features"] = TorchEngine(target, 12).run(call)["features"][: min(count, tokens)]
    wanted = TorchEngine(draft, 12).run(call, **inputs)

    projection = projected(draft)
    combining = TargetModule(target.network, target.feature_layers, projection)
    features = TorchEngine(combining, 12).run(call)["features"]
    assert features.shape[1] == draft.network.config.hidden_size == feature_size(draft)
    got = TorchEngine(draft, 12).run(call, **inputs | {"features": features[: len(inputs["features"])]})
    for name, values in wanted.items():
        np.testing.assert_allclose(got[name], values, atol=1e-5)

    for role, value in ((combining, "output"), (draft, "input")):  # in the graphs that TensorRT compiles, too
        export(role, tmp_path / "m.onnx")
        graph = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph
        [found] = [each for each in getattr(graph, value) if each.name == "features"]
        assert found.type.tensor_type.shape.dim[1].dim_value == features.shape[1]


def test_a_draft_that_combines_nothing_is_left_as_it_is(networks):
    role = roles_of("model", networks)["draft"]
    assert projected(role) is None
