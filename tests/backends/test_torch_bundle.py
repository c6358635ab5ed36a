"""A bundle that PyTorch runs: built, opened and answering like the OpenVINO one."""

import pytest
from pairs import recipe_of

from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.errors import UserError


@pytest.mark.parametrize("pair", ["eagle3", "dspark"])
def test_it_answers_like_the_openvino_bundle(pair, networks, bundle_of, tmp_path):
    manifest = build(recipe_of(pair, networks, engine="torch"), networks, tmp_path / "torch")
    assert manifest.checks["target"].tree_error < 1e-5
    assert manifest.checks["draft"].tree_error < 1e-5
    prompts, params = [[7, 8, 9], [*range(40, 90)]], SamplingParams(12, ignore_eos=True)
    texts = [
        [c.token_ids for c in LLM(bundle, "static", batch=2).generate(prompts, params)]
        for bundle in (tmp_path / "torch", bundle_of(pair))
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0][1])) > 1


def test_a_precision_it_has_not_is_refused(networks, tmp_path):
    with pytest.raises(UserError, match="precision is 'int8', which torch does not have; use one of fp32, bf16, fp16"):
        build(recipe_of("lookup", networks, engine="torch", precision="int8"), networks, tmp_path / "torch")
