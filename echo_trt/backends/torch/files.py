"""A role as one safetensors file, for bundles that PyTorch runs: weights, and a header with role and sizes."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from echo_trt.errors import UserError
from echo_trt.models.config import DecoderConfig
from echo_trt.models.families import FAMILIES
from echo_trt.models.fp8_linear import E4M3, Fp8Linear, dequantise, has_fp8_products
from echo_trt.models.layers import Rotary
from echo_trt.models.roles import Role, computed_in, role_named
from echo_trt.models.weights import TYPES

SCALE = ".scale"  # ends the name of an FP8 matrix's scales
#: Device, type and shape -> the newest embedding of an open network.
_EMBEDDINGS = WeakValueDictionary[tuple, torch.nn.Parameter]()


def save_role(role: Role, path: Path, precision: str) -> None:
    """Write ``role`` in ``precision``, one of TYPES, with what a head shares with its target.

    Matrices in FP8 are written as they are, with their scales.
    """
    rotary = getattr(role.network, "rotary", None)
    header = {
        "role": role.name,
        "config": dataclasses.asdict(role.network.config),
        "positions": len(rotary.cos) if rotary else 0,
        "setting": list(role.feature_layers) if role.name == "target" else role.top_k,
    }
    state = role.network.state_dict()
    kept = {name for name, tensor in state.items() if tensor.dtype == E4M3 or not tensor.is_floating_point()}
    kept |= {name for name in state if name.endswith(SCALE)}
    weights = {n: (tensor if n in kept else tensor.to(TYPES[precision])).contiguous() for n, tensor in state.items()}
    save_file(weights, path, {"echo_trt": json.dumps(header)})


def load_role(path: Path, device: str = "cpu", in_fp8: bool | None = None) -> Role:
    """Load the role that ``save_role`` wrote, with weights on ``device``.

    in_fp8  whether matrices in FP8 stay so, and are dequantised otherwise; None: where the device multiplies in FP8
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            header = json.loads(file.metadata()["echo_trt"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  the file is no mapping
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no network of echo-trt ({error}); build the bundle again.") from error
    kind, setting, positions = header["role"], header["setting"], header["positions"]
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in header["config"].items()}
    role_class, config_class, network_of = role_named(kind)
    if config_class is DecoderConfig:
        config_class = FAMILIES[values["family"]].config
    config = config_class(**values)
    with torch.device("meta"):
        network = network_of(config, positions)
    rows = [name for name in weights if name.endswith(SCALE)]
    for name in rows:
        module = name.removesuffix(SCALE)
        linear = Fp8Linear(weights[f"{module}.weight"], weights[name], weights.get(f"{module}.bias"))
        network.set_submodule(module, linear)
    network.load_state_dict(weights, assign=True)
    del weights
    if rows and not (has_fp8_products(torch.device(device)) if in_fp8 is None else in_fp8):
        if in_fp8 is None:
            warnings.warn(
                f"the {kind}'s FP8 matrices are dequantised on {device}, where they take twice the memory; products in "
                "FP8 need a GPU of compute capability 8.9 or newer",
                stacklevel=2,
            )
        dequantise(network, computed_in(network))
    if positions:
        network.rotary = Rotary(config, positions).to(device)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    _share_embedding(network.embed)
    return role_class(network.eval(), tuple(setting) if kind == "target" else setting)


def _share_embedding(embed: torch.nn.Embedding) -> None:
    """Let a network read the table of one that is open, where they are equal: most heads have their target's."""
    table = embed.weight
    key = table.device, table.dtype, table.shape
    known = _EMBEDDINGS.setdefault(key, table)
    if known is not table and torch.equal(known, table):
        embed.weight = torch.nn.Parameter(known.data, requires_grad=False)
        if table.is_cuda:
            del table
            torch.cuda.empty_cache()  # or the copy's memory would stay PyTorch's
    else:
        _EMBEDDINGS[key] = table
