"""Products in FP8, a bundle in fp8, and its engine on a CPU, where products of blocks are emulated."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models.fp8_checkpoints import BLOCK, configure, quantise
from pairs import recipe_of
from refusal import refused
from safetensors.torch import load_file
from test_torch_engine import BLOCKS, calls

from echo_trt.backends.self_check import BOUNDS
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.backends.torch.files import load_role
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.models.fp8_linear import E4M3, Fp8Linear, has_fp8_products, quantise_rows
from echo_trt.models.layers import Linear


@pytest.fixture(scope="module")
def fp8_networks(networks, tmp_path_factory) -> Path:
    """Write the pairs' target in FP8 with block scales, and the other folders as they are."""
    folder = tmp_path_factory.mktemp("fp8")
    shutil.copytree(networks, folder, dirs_exist_ok=True)
    quantise(folder / "target", "block")
    configure(folder / "target", quant_method="fp8", weight_block_size=list(BLOCK))
    return folder


@pytest.fixture(scope="module")
def bundle(fp8_networks, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "fp8"
    build(recipe_of("eagle3", fp8_networks, engine="torch", precision="fp8"), fp8_networks, out)
    return out


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 64, 48), (7, 576, 960), (33, 1024, 512)])
def test_a_product_is_near_that_of_the_dequantised_matrix(tokens, inputs, outputs, blocks):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, inputs, generator=generator).to(torch.bfloat16)
    x[0] *= 1000  # a token's scale is its own
    weight, scale = quantise_rows(torch.randn(outputs, inputs, generator=generator))
    product = Fp8Linear(weight, torch.rand(outputs // 16, inputs // 32, generator=generator) if blocks else scale)
    wanted = torch.nn.functional.linear(x.float(), product.dequantised(torch.float32))
    assert torch.equal(product(x.float()), wanted)
    off = (product(x).float() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert 0 < off.max() < 0.04


def test_an_fp8_bundle_holds_the_matrices_of_layers_in_fp8(bundle, fp8_networks):
    held = load_file(bundle / "target.safetensors")
    stored = load_file(fp8_networks / "target" / "model.safetensors")
    in_fp8 = {name for name, tensor in held.items() if tensor.dtype == E4M3}
    parts = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    assert in_fp8 == {f"layers.{i}.{part}.weight" for i in range(3) for part in parts}
    assert {tensor.dtype for name, tensor in held.items() if name not in in_fp8 and "scale" not in name} == {
        torch.bfloat16
    }
    down, scale = (f"model.layers.1.mlp.down_proj.weight{end}" for end in ("", "_scale_inv"))
    assert torch.equal(held["layers.1.mlp.down.weight"].view(torch.uint8), stored[down].view(torch.uint8))
    assert torch.equal(held["layers.1.mlp.down.scale"], stored[scale])
    draft = load_file(bundle / "draft.safetensors")
    assert {tensor.dtype for tensor in draft.values() if tensor.is_floating_point()} == {torch.bfloat16}


def test_an_engine_in_fp8_is_near_the_reference_and_a_cpu_dequantises(bundle):
    role = load_role(bundle / "target.safetensors", in_fp8=True)
    with pytest.warns(match="the target's FP8 matrices are dequantised on cpu"):
        plain = load_role(bundle / "target.safetensors")
    assert isinstance(role.network.layers[0].mlp.down, Fp8Linear)
    assert isinstance(plain.network.layers[0].mlp.down, Linear)
    reference = load_role(bundle / "target.safetensors", in_fp8=False)
    reference.network.float()
    engines = [TorchEngine(each, BLOCKS) for each in (reference, role, plain)]
    for call in calls(0):
        wanted, fp8, bf16 = (engine.run(call)["logits"] for engine in engines)
        largest = np.abs(wanted).max()
        assert np.abs(bf16 - wanted).max() / largest < BOUNDS["bf16"]
        assert 0 < np.abs(fp8 - bf16).max() / largest < BOUNDS["fp8"]


@pytest.mark.parametrize(("capability", "has"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((12, 0), True)])
def test_a_card_is_asked_for_its_capability_before_it_multiplies_in_fp8(capability, has, monkeypatch):
    """A trial on an A100 ends in an error of Triton's compiler, and one without a C compiler in another."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_fp8_products(torch.device("cuda", 0)) == has


def test_an_fp8_bundle_answers_as_the_bundle_of_the_dequantised_checkpoint(bundle, fp8_networks, tmp_path):
    build(recipe_of("eagle3", fp8_networks, engine="torch", precision="bf16"), fp8_networks, tmp_path / "bf16")
    params, prompt = SamplingParams(24, ignore_eos=True), list(range(5, 40))
    texts = [LLM(b, "echo", 2).generate([prompt], params)[0].token_ids for b in (bundle, tmp_path / "bf16")]
    assert texts[0] == texts[1]


def test_fp8_of_a_checkpoint_without_fp8_is_refused(networks, tmp_path):
    with refused("precision is 'fp8', but", "has no FP8 weights; use bf16"):
        build(recipe_of("lookup", networks, engine="torch", precision="fp8"), networks, tmp_path / "bundle")
    with refused("precision is 'fp8', which openvino does not have"):
        build(recipe_of("lookup", networks, precision="fp8"), networks, tmp_path / "bundle")


def test_the_script_prints_the_agreement_of_rows_and_blocks(networks, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(f"name: tiny\ntarget: {{path: {networks / 'target'}}}\n")
    (tmp_path / "text").write_text("the theme of the thing " * 10)
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "benchmarks" / "fp8_agreement.py"))
    script["main"](tmp_path / "recipe.yaml", tmp_path / "text", 24)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [
        f"{scales}, {kind}" for scales in ("rows", "blocks") for kind in ("bf16", "W8A8")
    ]
    assert all(0 < float(off) < 0.5 for _, _, off in rows)
    assert float(rows[2][2]) < float(rows[3][2])  # weights are as stored, and activations are rounded
