"""A mixture's tokens, routed to their experts: the right result, inside a CUDA graph, and faster than all experts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from echo_trt.models.layers import Experts, has_grouped_products
from gpu_proof_parts.networks import SMALL
from gpu_proof_parts.report import Proof

BOUND = 0.02  # of the largest value, in bfloat16

#: One layer of Qwen3-30B-A3B
LAYER = dataclasses.replace(SMALL, hidden_size=2048, num_experts=128, experts_per_token=8, expert_size=768)
TINY_LAYER = dataclasses.replace(SMALL, hidden_size=32, num_experts=5, experts_per_token=2, expert_size=16)


@torch.no_grad()
def prove_experts(proof: Proof) -> None:
    config = TINY_LAYER if proof.interpret else LAYER
    layer = Experts(config).to(proof.device, torch.bfloat16).eval()
    for parameter in layer.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5)
    x = torch.randn(64, config.hidden_size, device=proof.device, dtype=torch.bfloat16)
    name = "tokens are routed to their experts, in a CUDA graph"
    if not (proof.interpret or has_grouped_products(x, layer.down)):
        proof.check(name, None, "PyTorch's grouped product is for capabilities 9.x and 10.x: every expert computes")
        return
    top, chosen = layer.router(x).float().softmax(dim=-1).topk(layer.top_k, dim=-1)
    top = (top / top.sum(dim=-1, keepdim=True) if layer.normalise else top).to(x.dtype)
    weights = torch.zeros(len(x), config.num_experts, device=x.device, dtype=x.dtype).scatter(-1, chosen, top)
    routed = layer._routed(x, top, chosen) if proof.interpret else replayed(layer, x)
    wanted = layer._dense(x, weights)
    error = float((routed - wanted).abs().max() / wanted.abs().max())
    detail = f"{error:.1e} of the largest value from all experts' sum"
    if proof.device.type == "cuda":
        ratio = seconds(lambda: layer._dense(x, weights)) / seconds(lambda: layer._routed(x, top, chosen))
        detail += f"; {ratio:.1f} times as fast at {len(x)} tokens"
        proof.record(experts_speedup=ratio)
    proof.check(name, error <= BOUND, detail)
    proof.record(experts_error=error)


def replayed(layer: Experts, x: Tensor) -> Tensor:
    """Return the layer's output for ``x``, by a graph that was captured on other tokens."""
    held, side = torch.randn_like(x), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(held)
    held.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    return output


def seconds(run, count: int = 20) -> float:
    """Time ``count`` calls of ``run`` on the device, after three that are not timed."""
    for _ in range(3):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count
