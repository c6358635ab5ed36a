"""A layer's small steps as Triton kernels against PyTorch's operators, in Triton's interpreter, and how many remain."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from backends.launches import Launches
from plugins.interpreted import interpreted

from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.models import layers
from echo_trt.models.config import DecoderConfig
from echo_trt.models.decoder import Decoder
from echo_trt.models.layers import MLP, Attention, RMSNorm, Rotary
from echo_trt.models.roles import TargetModule
from echo_trt.speculation.pack import pack

NAME = "super_tree_attention.layer_kernels"
CONFIG = DecoderConfig(
    family="qwen3", vocab_size=90, hidden_size=80, intermediate_size=112, num_layers=2, num_heads=6, num_kv_heads=2,
    head_dim=16, max_position=64, rope_theta=1e4, rope_scaling={}, norm_eps=1e-6, tie_embeddings=True, qk_norm=True,
)  # fmt: skip
#: float32 by sums in another order; bfloat16 by two roundings, which the interpreter takes for truncations.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def both_ways(monkeypatch):
    """Return a function that computes by operators, and then by kernels."""

    def compute(step):
        with torch.inference_mode():
            monkeypatch.setattr(layers, "fused", lambda x: None)
            plain = step()
            monkeypatch.setattr(layers, "fused", lambda x: interpreted(NAME))
            if DEVICE == "cuda":
                monkeypatch.undo()
            return plain, step()

    return compute


def close(pair) -> None:
    for plain, kernel in zip(*pair, strict=True):
        assert plain.dtype == kernel.dtype
        torch.testing.assert_close(kernel, plain, atol=TOLERANCE[plain.dtype], rtol=TOLERANCE[plain.dtype])


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_add_and_norm(dtype, both_ways):
    norm = RMSNorm(80, 1e-6).to(DEVICE, dtype)
    norm.weight.data = random(80, dtype=dtype)
    x, delta = random(5, 80, dtype=dtype), 3 * random(1, 5, 80, dtype=dtype)[0]
    close(both_ways(lambda: norm.add(x, delta)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_gated_mlp(dtype, both_ways):
    mlp = MLP(80, 1100).to(DEVICE, dtype)
    mlp.down = torch.nn.Identity()
    x = 4 * random(5, 80, dtype=dtype)
    close(both_ways(lambda: (mlp(x),)))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_query_key_and_value(dtype, qk_norm, both_ways):
    attention = Attention(CONFIG, 0, 80, qk_norm).to(DEVICE, dtype)
    for norm in (attention.query_norm, attention.key_norm) if qk_norm else ():
        norm.weight.data = random(16, dtype=dtype)
    cos, sin = Rotary(CONFIG, 64).to(DEVICE)(torch.tensor([0, 1, 7, 63], device=DEVICE))
    x, given = random(4, 80, dtype=dtype), []
    close(both_ways(lambda: (attention(x, cos, sin, attend_with(given, dtype)), *given)))


def attend_with(given: list, dtype: torch.dtype):
    """Return an attention that notes query, key and value in the network's type, and returns the query."""
    given.clear()
    return lambda layer, *packed: given.extend(part.to(dtype) for part in packed) or given[0]


def launches_of(layers_of: int, counted, monkeypatch) -> int:
    """Count launches of a pass of ``layers_of`` layers in the PyTorch engine, on 12 tokens in bfloat16."""
    network = Decoder(dataclasses.replace(CONFIG, num_layers=layers_of), 64).to(torch.bfloat16)
    network.rotary.float()

    def operator(*arguments, sliding_window):
        for tensor in arguments[:3]:
            tensor.contiguous()
        counts.counts.update(["attention", "combine"])
        return torch.empty_like(arguments[0])

    engine, counts = TorchEngine(TargetModule(network), 4, operator=operator, resident=True), Launches()
    module = interpreted(NAME)
    stand_ins = counts.kernels("add_norm_kernel", "silu_mul_kernel", "rotated_kernel")
    for name in vars(stand_ins):
        monkeypatch.setattr(module, name, getattr(stand_ins, name))
    monkeypatch.setattr(layers, "fused", lambda x: module if counted else None)
    rows = torch.arange(12).numpy()
    call = pack(rows, rows, rows[:1], rows[:1] + 12, rows[None, :1], rows)
    with counts:
        engine.run(call)
    return counts.total


def test_a_layer_is_ten_launches(monkeypatch):
    """Four matrix products, attention and its merge, two sums with norms, rotation, activation."""
    assert launches_of(3, True, monkeypatch) - launches_of(2, True, monkeypatch) == 10
    assert launches_of(3, False, monkeypatch) - launches_of(2, False, monkeypatch) == 23


def test_a_target_with_features(both_ways):
    network = Decoder(dataclasses.replace(CONFIG, num_layers=4), 64).to(DEVICE)
    rows = torch.arange(6).numpy()
    call = pack(rows, rows, rows[:1], rows[:1] + 6, rows[None, :1], rows)

    def step():
        outputs = TorchEngine(TargetModule(network, (1, 2, 3)), 4, DEVICE).run(call)
        return tuple(torch.from_numpy(outputs[name].copy()) for name in ("logits", "features"))

    (plain, features), (found, others) = both_ways(step)
    torch.testing.assert_close((found, others), (plain, features), atol=1e-5, rtol=1e-5)
