"""Compare FP8 products with a network in float32 on a text: shares of equal best tokens, and the largest error.

    python scripts/benchmarks/fp8_agreement.py build/smollm2-135m.yaml README.md --tokens 300

The recipe's target is quantised here, once by rows and once by blocks of 128 x 128, as published checkpoints are (of 64
where 128 does not divide a size). The reference is the network of the weights that these stand for. The CPU has
PyTorch's product of rows; products of blocks are emulated, with the scales and roundings of the kernel.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from cyclopts import Parameter, run

from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.bundle.read_recipe import load_recipe
from echo_trt.bundle.sources import locate
from echo_trt.models.decoder import Decoder
from echo_trt.models.fp8_linear import E4M3, LARGEST, Fp8Linear, quantise_rows, takes
from echo_trt.models.layers import Linear
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.open_tokenizer import read_tokenizer
from echo_trt.models.roles import TargetModule
from echo_trt.models.weights import load_decoder
from echo_trt.speculation.pack import BLOCK as KV_BLOCK
from echo_trt.speculation.pack import pack

BLOCK = (128, 128)


def main(recipe: Path, text: Path, tokens: Annotated[int, Parameter(help="of the text")] = 300) -> None:
    """Print a table in markdown."""
    checkpoint = open_checkpoint(locate(load_recipe(recipe).target, recipe.parent))
    ids = np.array(read_tokenizer(checkpoint)(text.read_text("utf-8"))["input_ids"][:tokens])
    print("| scales, products | equal best tokens | largest error |")
    print("|---|---|---|")
    for name in ("rows", "blocks"):
        plain = load_decoder(checkpoint, tokens, torch.float32)
        in_fp8 = copy.deepcopy(plain)
        for path, module in list(plain.named_modules()):
            if path.startswith("layers.") and isinstance(module, Linear) and takes(module.weight.shape):
                product = Fp8Linear(*(by_blocks if name == "blocks" else quantise_rows)(module.weight))
                in_fp8.set_submodule(path, product)
                module.weight.data = product.dequantised(torch.float32)
        wanted = logits(plain, torch.float32, ids)
        for kind, network in (("bf16", plain), ("W8A8", in_fp8)):
            got = logits(network, torch.bfloat16, ids)
            same, off = (got.argmax(1) == wanted.argmax(1)).mean(), abs(got - wanted).max() / abs(wanted).max()
            print(f"| {name}, {kind} | {same:.3f} | {off:.3f} |", flush=True)


def by_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix [O, I] to e4m3 with a scale per block, of sizes that divide it."""
    rows, columns = map(math.gcd, weight.shape, BLOCK)
    blocks = weight.view(len(weight) // rows, rows, -1, columns)
    scale = blocks.abs().amax((1, 3)) / LARGEST
    return (blocks / scale[:, None, :, None]).to(E4M3).view(weight.shape), scale


def logits(network: Decoder, dtype: torch.dtype, ids: np.ndarray) -> np.ndarray:
    """Return the logits float32 [N, V] of a text, with all but FP8 in ``dtype``."""
    network = copy.deepcopy(network)
    for parameter in network.parameters():
        if parameter.dtype != E4M3:
            parameter.data = parameter.data.to(dtype)
    rows, blocks = np.arange(len(ids)), -(-len(ids) // KV_BLOCK)
    call = pack(ids, rows, np.zeros(1, np.int64), np.array([len(ids)]), np.arange(blocks)[None], rows)
    return TorchEngine(TargetModule(network), blocks).run(call)["logits"]


if __name__ == "__main__":
    run(main)
