"""The kernels of FP8 against PyTorch, in Triton's interpreter, and compiled for cards."""

from __future__ import annotations

import pytest
import torch
from interpreted import interpreted

from echo_trt.models.fp8_linear import E4M3, Fp8Linear, quantise_rows

NAME = "echo_trt.models.fp8_kernel"


@pytest.mark.parametrize("width", [16, 1024, 2500])
def test_the_kernel_quantises_as_pytorch_does(width):
    module = interpreted(NAME)
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).to(torch.bfloat16)
    x[1] = 0
    x[2] *= 1e4
    wanted, scales = quantise_rows(x)
    # In float32, since Triton's interpreter loses a carry when it rounds to e4m3, as no card does.
    rows, found = torch.empty(5, width), torch.empty(5, 1)
    module.quantise[(5,)](x, rows, found, width, WIDTH=1024)
    assert torch.equal(found, scales)
    assert torch.equal(rows.to(E4M3).view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(("tokens", "outputs"), [(1, 96), (17, 48), (70, 128)])
def test_the_kernel_multiplies_blocks_as_pytorch_does(tokens, outputs):
    """A tile, one that is partly empty, and two; rows of several blocks in a tile; scales far apart."""
    generator = torch.Generator().manual_seed(tokens)
    x, weight = (torch.randn(n, 96, generator=generator).to(torch.bfloat16) for n in (tokens, outputs))
    scale = torch.rand(outputs // 16, 3, generator=generator) * 10.0 ** torch.arange(-2, 1)
    product = Fp8Linear(weight.to(E4M3), scale)
    pieces, scales = quantise_rows(x.view(-1, 32))
    exact = pieces.float().view(x.shape), scales, product.weight.float(), scale  # NumPy has no e4m3
    got = interpreted(NAME).multiply_by_kernel(*exact)
    assert got.shape == (tokens, outputs)
    wanted = product(x).float()
    assert (got.float() - wanted).abs().max() <= wanted.abs().max() * 2**-7  # of which both round to bfloat16
