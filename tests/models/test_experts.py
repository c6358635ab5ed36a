"""A mixture of experts: tokens routed to their experts beside every expert for every token."""

from types import SimpleNamespace

import pytest
import torch
from checkpoints import qwen3_moe

from echo_trt.models.layers import Experts, has_grouped_products
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.weights import load_decoder


@pytest.fixture
def experts(tmp_path) -> Experts:
    qwen3_moe(hidden_size=24, moe_intermediate_size=24).save_pretrained(tmp_path)
    return load_decoder(open_checkpoint(tmp_path), positions=64).layers[0].mlp.eval()


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_both_ways_compute_the_same(experts, tokens, dtype):
    experts = experts.to(dtype)
    x = torch.randn(tokens, experts.router.in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    top, chosen = experts.router(x).float().softmax(dim=-1).topk(experts.top_k)
    dense = experts._dense(x, torch.zeros(tokens, len(experts.down)).scatter(-1, chosen, top).to(dtype))
    routed = experts._routed(x, top.to(dtype), chosen)
    torch.testing.assert_close(routed, dense, rtol=0, atol=2e-6 if dtype == torch.float32 else 0.03)


@torch.no_grad()
def test_an_exported_graph_has_standard_operators_alone(experts):
    x = torch.randn(6, experts.router.in_features)
    exported = torch.export.export(experts, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert not any("grouped_mm" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), experts(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "capability", "size", "grouped"),
    [
        (torch.bfloat16, (9, 0), 24, True),
        (torch.bfloat16, (10, 3), 24, True),
        (torch.bfloat16, (8, 9), 24, False),
        (torch.bfloat16, (12, 0), 24, False),
        (torch.float32, (9, 0), 24, False),
        (torch.bfloat16, (9, 0), 11, False),
    ],
)
def test_products_are_grouped_where_pytorch_has_a_kernel(dtype, capability, size, grouped, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, element_size=lambda: dtype.itemsize)
    assert has_grouped_products(x, torch.zeros(7, 24, size)) == grouped
    assert not has_grouped_products(torch.zeros(3, 24, dtype=dtype), torch.zeros(7, 24, size))
