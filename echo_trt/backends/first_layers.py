"""A reference for networks whose matrices stayed in their file: their first layers, multiplied from there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor, nn

from echo_trt.models.layers import Experts, ReadBlocks, widened
from echo_trt.models.roles import DraftModule, Role, TargetModule

#: Weights of the layers that a check reads from a file; of the first one in any case. Larger: more layers are checked,
#: and a build takes 2 seconds longer for every 100 million.
CHECKED = 60_000_000
OUTPUTS = 8192  # tokens whose logits are compared; larger: a longer check
PART = 1 << 18  # weights that are dequantised at a time; larger: they leave the CPU's cache


def in_blocks(role: Role) -> bool:
    """Return whether matrices of a role stayed in their file."""
    return any(parameter.is_meta for parameter in role.parameters())


def layers_within(role: Role) -> int:
    """Return how many layers of a role's network have CHECKED weights: one of each kind at least."""
    layers = getattr(role.network, "layers", ())
    each = sum(parameter.numel() for parameter in layers[0].parameters()) if layers else 1
    kinds = [type(layer.attention) for layer in layers] or [None]
    minimum = max(map(kinds.index, kinds)) + 1  # one of each kind
    return min(max(CHECKED // each, minimum), max(len(layers), 1))


def first_layers(role: Role, layers: int) -> Role:
    """Return a role over the network's first ``layers`` layers, whose matrices are read as they are multiplied.

    Of a target's logits it has the first OUTPUTS.
    """
    role, network = copy.copy(role), copy.copy(role.network)
    if isinstance(role, TargetModule | DraftModule):
        network._modules = {**network._modules, "layers": network.layers[:layers]}
        linear = getattr(network.config, "recurrent_layers", None)
        kept = {} if linear is None else {"recurrent_layers": tuple(each for each in linear if each < layers)}
        network.config = replace(network.config, num_layers=layers, **kept)
    network = copy.deepcopy(network, {id(each): each for each in network.parameters()})  # which are shared
    outputs = OUTPUTS if isinstance(role, TargetModule) else network.config.vocab_size
    named = dict(network.named_parameters(remove_duplicate=False))  # a table may be the output matrix, too
    for name in network.stored.keys() & named.keys():
        if named[name].is_meta:
            _read_as_multiplied(network, name, outputs)
    if isinstance(role, TargetModule):
        return TargetModule(network)
    return type(role)(network, role.top_k)


def _read_as_multiplied(network: nn.Module, name: str, outputs: int) -> None:
    module, read = network.get_submodule(name.rpartition(".")[0]), network.stored[name]
    if isinstance(module, Experts):
        reads = {leaf: network.stored.get(f"{name.rpartition('.')[0]}.{leaf}") for leaf in ("gate_up", "down")}
        module.forward = partial(_mixed, module, reads)
        module.register_parameter(name.rpartition(".")[2], None)
        return
    height, bias = len(module.weight), getattr(module, "bias", None)

    def matrix(height: int) -> Callable[[], Tensor]:
        return cache(lambda: torch.cat([*_rows(read, height)]))  # all calls of a check multiply by it

    embeds = isinstance(module, nn.Embedding)
    module.forward = partial(_looked_up, read) if embeds else partial(_multiplied, matrix(height), bias)
    module.weight = None
    if name == ("embed.weight" if network.lm_head is None else "lm_head.weight"):
        network.logits = partial(_multiplied, matrix(min(outputs, height)), None)


def _multiplied(matrix: Callable[[], Tensor], bias: Tensor | None, x: Tensor) -> Tensor:
    return nn.functional.linear(x, matrix(), bias)


def _mixed(experts: Experts, reads: dict[str, ReadBlocks | None], x: Tensor) -> Tensor:
    """Mix the outputs of the chosen experts for x [N, H], one expert after the other."""

    def matrices(leaf: str, expert: int, parts: int) -> Iterator[Tensor]:
        if read := reads[leaf]:
            return (_dequantised(*read(expert * parts + part)) for part in range(parts))
        return iter(widened(getattr(experts, leaf)[expert], x).chunk(parts))

    _, weights, chosen = experts.choose(x)
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, pick = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (nn.functional.linear(x[rows], matrix) for matrix in matrices("gate_up", expert, 2))
        (down,) = matrices("down", expert, 1)
        out[rows] += nn.functional.linear(nn.functional.silu(gate) * up, down) * weights[rows, pick, None]
    return out


def _rows(read: ReadBlocks, height: int) -> Iterator[Tensor]:
    """Yield the first ``height`` rows of a matrix, which is stored in one part or several, as float32 [n, K]."""
    done, part = 0, 0
    while done < height:
        kind, blocks = read(part)
        blocks = blocks[: height - done]
        step = max(PART // blocks.shape[1], 1)
        yield from (_dequantised(kind, blocks[begin : begin + step]) for begin in range(0, len(blocks), step))
        done, part = done + len(blocks), part + 1


def _looked_up(read: ReadBlocks, token_ids: Tensor) -> Tensor:
    kind, blocks = read(0)
    return _dequantised(kind, blocks[token_ids])


def _dequantised(kind: str, blocks: Tensor) -> Tensor:
    return torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[kind.upper()]))
