"""Matrices in FP8 with a scale per row or per block, multiplied in FP8 (W8A8) where the device has that product.

A token's activations get scales of their own as they come, one for each block of columns that the matrix has, so a
token does not depend on its neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echo_trt.models.layers import Linear

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST = 1e-12  # of a row's largest magnitude; smaller: the scale is no normal float32, which a GPU takes for 0
FIRST_CAPABILITY = (8, 9)  # compute capability of the first cards that multiply in FP8: Ada and Hopper
MULTIPLE = 16  # of both sizes of a matrix, for PyTorch's product
BLOCK_COLUMNS = (32, 64, 128, 256)  # of blocks that the kernel multiplies


class Fp8Linear(nn.Module):
    """A matrix product.

    weight  e4m3 [O, I]
    scale   float32 [O / r, I / c], of the matrix's blocks of r rows and c columns; [O, 1]: of its rows
    bias    [O], or None
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [N, I]: in FP8 if it is bfloat16, else by the dequantised matrix in the type of x."""
        if x.dtype != torch.bfloat16:
            return F.linear(x, self.dequantised(x.dtype), self.bias)
        product = self._by_rows(x) if len(self.scale) == len(self.weight) else self._by_blocks(x)
        return product if self.bias is None else product + self.bias

    def _by_rows(self, x: Tensor) -> Tensor:
        rows, scales = quantise_rows(x)
        sizes = {"scale_a": scales, "scale_b": self.scale.t(), "out_dtype": x.dtype}
        return torch._scaled_mm(rows, self.weight.t(), **sizes, use_fast_accum=True)

    def _by_blocks(self, x: Tensor) -> Tensor:
        """Multiply as vLLM and DeepSeek do: a scale per token and block of columns, sums of a block in float32."""
        pieces, scales = quantise_rows(x.reshape(-1, self.block_columns))
        if x.device.type == "cuda":
            from echo_trt.models.fp8_kernel import multiply_by_kernel

            return multiply_by_kernel(pieces.view(x.shape), scales, self.weight, self.scale)
        exact = (pieces.float() * scales).view(x.shape)
        return F.linear(exact, self.dequantised(torch.float32)).to(x.dtype)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        blocks = self.weight.float().view(len(self.scale), -1, self.scale.shape[1], self.block_columns)
        return (blocks * self.scale[:, None, :, None]).view(self.weight.shape).to(dtype)

    @property
    def block_columns(self) -> int:
        return self.weight.shape[1] // self.scale.shape[1]


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the rows of x [n, k]: e4m3 [n, k], and their scales float32 [n, 1]."""
    if x.device.type == "cuda":
        from echo_trt.models.fp8_kernel import quantise_by_kernel

        return quantise_by_kernel(x)
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (x / scale).to(E4M3), scale


def takes(shape: torch.Size) -> bool:
    """Tell whether PyTorch's product takes a matrix of ``shape``."""
    return len(shape) == 2 and not any(size % MULTIPLE for size in shape)


def has_fp8_products(device: torch.device) -> bool:
    """Tell whether ``device`` multiplies in FP8. A CPU does rows, too, but 30 times slower than in bfloat16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY


def dequantise(network: nn.Module, dtype: torch.dtype) -> None:
    """Replace the FP8 matrices of ``network`` by matrices of ``dtype``, one by one."""
    for name, module in list(network.named_modules()):
        if isinstance(module, Fp8Linear):
            with torch.device("meta"):
                plain = Linear(*reversed(module.weight.shape))
            plain.weight, plain.bias = nn.Parameter(module.dequantised(dtype), requires_grad=False), module.bias
            network.set_submodule(name, plain)
