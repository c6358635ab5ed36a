"""The kernel that quantises activations against PyTorch, in Triton's interpreter, and compiled for cards."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from echo_trt.models.fp8_linear import E4M3, quantise_rows

triton = pytest.importorskip("triton", reason="needs Triton: pip install -e '.[cuda]'")


@pytest.mark.parametrize("width", [16, 1024, 2500])
def test_the_kernel_quantises_as_pytorch_does(width):
    spec = importlib.util.find_spec("echo_trt.models.fp8_kernel")
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).to(torch.bfloat16)
    x[1] = 0
    x[2] *= 1e4
    wanted, scales = quantise_rows(x)
    # In float32, since Triton's interpreter loses a carry when it rounds to e4m3, as no card does.
    rows, found = torch.empty(5, width), torch.empty(5, 1)
    module.quantise[(5,)](x, rows, found, width, WIDTH=1024)
    assert torch.equal(found, scales)
    assert torch.equal(rows.to(E4M3).view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("capability", [89, 90, 100, 120])
def test_the_kernel_compiles_for_cards_without_spills(capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from echo_trt.models import fp8_kernel

    types = ["*bf16", "*fp8e4nv", "*fp32", "i32", "constexpr"]
    signature = dict(zip(fp8_kernel.quantise.arg_names, types, strict=True))
    source = ASTSource(fp8_kernel.quantise, signature, {"WIDTH": 1024})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.metadata.shared < 1024
    assert ".local" not in compiled.asm["ptx"]
    assert "e4m3x2" in compiled.asm["ptx"]
