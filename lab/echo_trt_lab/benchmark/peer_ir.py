"""Networks for OpenVINO GenAI: transformers' graph, with its KV cache as OpenVINO state.

It is a plain trace, as optimum-intel makes it (whose releases need an older transformers than ours). Query, key, value,
gate and up matrices are separate. Weights are in fp32, and GenAI rounds them as it compiles; or as our engine stores
them, in fp16 or in int8. GenAI turns the state into paged attention by itself.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn
from transformers import PreTrainedConfig

from echo_trt.backends.openvino.cpu import stores_fp16
from echo_trt.bundle.manifest import Manifest
from echo_trt.bundle.sources import cache_folder
from echo_trt_lab.benchmark.peer_head import EagleHead, hidden_layers, load_head
from echo_trt_lab.benchmark.peer_transformers import load_network

#: GenAI's inputs of a language model, besides the state: int64 [B, T], [B, past + T], [B, T] and int32 [B].
INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")


def target_ir(checkpoint: Path, manifest: Manifest) -> Path:
    """Return the target's folder for GenAI, which is made once for its weights."""

    def write(folder: Path) -> None:
        network = load_network(checkpoint)
        _save(_convert(_Stateful(network), network.config), folder, manifest)
        network.config.save_pretrained(folder)

    return _cached("target", manifest, write)


def head_ir(checkpoint: Path, target: Path, manifest: Manifest) -> Path:
    """Return the EAGLE-3 head's folder for GenAI, which is made once for its weights, beside its target's."""

    def write(folder: Path) -> None:
        head = load_head(checkpoint, target)
        model = _convert(_StatefulHead(head), head.config, features=head.fc.in_features)
        # GenAI recognises a head by the mode, and takes the draft vocabulary's offsets from a constant of this name.
        offsets = ops.constant(head.offsets.numpy(), name="d2t")
        offsets.output(0).set_names({"d2t"})
        model.add_results([ops.result(offsets)])
        model.set_rt_info("True", ["eagle3_mode"])
        model.set_rt_info(hidden_layers(checkpoint, target), ["hidden_layers_list"])
        _save(model, folder, manifest)
        head.config.save_pretrained(folder)

    return _cached(f"head-{manifest.draft_sha256}", manifest, write)


class _Past:
    """A cache for transformers' attention; ``tensors`` are key, value, key, ..., float32 [B, Hk, past, D]."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = list(tensors)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        for i, new in enumerate((key, value), start=2 * layer):
            self.tensors[i] = torch.cat((self.tensors[i], new), dim=2)
        return self.tensors[2 * layer], self.tensors[2 * layer + 1]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.tensors[2 * layer].shape[2]


class _Stateful(nn.Module):
    """A network with its past as inputs; returns logits [B, T, V] and the past with the new tokens."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, *past: Tensor):
        cache = _Past([tensor.index_select(0, beam_idx) for tensor in past])
        mask = _causal(attention_mask, input_ids.shape[1])
        # By position: releases of transformers 5 name the cache's argument differently.
        return self.network(input_ids, mask, position_ids, cache).logits, *cache.tensors


class _StatefulHead(nn.Module):
    """A head with its past as inputs, and the target's features as hidden_states, float32 [B, T, 3 * H_target]."""

    def __init__(self, head: EagleHead):
        super().__init__()
        self.head = head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, hidden_states: Tensor,
        *past: Tensor,
    ):  # fmt: skip
        cache = _Past([tensor.index_select(0, beam_idx) for tensor in past])
        mask = _causal(attention_mask, input_ids.shape[1])
        return self.head(input_ids, mask, position_ids, hidden_states, cache), *cache.tensors


def _causal(attention_mask: Tensor, count: int) -> Tensor:
    """Build the mask of the last ``count`` tokens: bool [B, 1, T, past + T], true where a token sees another."""
    total = attention_mask.shape[1]
    columns, rows = torch.arange(total), torch.arange(count) + total - count
    return (columns[None, :] <= rows[:, None])[None, None] & attention_mask[:, None, None, :].bool()


def _convert(graph: nn.Module, config: PreTrainedConfig, features: int = 0) -> ov.Model:
    """Trace on two texts of 2 past and 3 new tokens, and make every KV cache a state."""
    layers, heads, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    past = [f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    names, shapes = [*INPUTS], [[-1, -1]] * 3 + [[-1]]
    example = [
        torch.zeros(2, 3, dtype=torch.long),
        torch.ones(2, 5, dtype=torch.long),
        torch.arange(2, 5).repeat(2, 1),
        torch.arange(2, dtype=torch.int32),
    ]
    if features:
        names, shapes, example = [*names, "hidden_states"], [*shapes, [-1] * 3], [*example, torch.ones(2, 3, features)]
    shapes += [[-1, heads, -1, size]] * len(past)
    example += [torch.zeros(2, heads, 2, size)] * len(past)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns of branches that are the same for every shape
        model = ov.convert_model(graph.eval(), example_input=tuple(example), input=[ov.PartialShape(s) for s in shapes])
    _name(model, [*names, *past], ["logits", *(f"present.{name}" for name in past)])
    apply_make_stateful_transformation(model, {name: f"present.{name}" for name in past})
    _start_empty(model, heads, size)
    return model


def _name(model: ov.Model, inputs: list[str], outputs: list[str]) -> None:
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})


def _start_empty(model: ov.Model, heads: int, size: int) -> None:
    """Begin every state as [B, Hk, 0, D]: GenAI recognises paged attention only where states have a beginning."""
    batch = ops.gather(ops.shape_of(model.input("input_ids").get_node(), "i64"), [0], 0)
    shape = ops.concat([batch, np.array([heads, 0, size], np.int64)], 0)
    empty = ops.broadcast(np.float32(0), shape)
    for operation in model.get_ops():
        if operation.get_type_name() == "ReadValue":
            operation.set_arguments([empty.output(0)])
    model.validate_nodes_and_infer_types()


def _save(model: ov.Model, folder: Path, manifest: Manifest) -> None:
    if manifest.precision == "int8":
        import nncf  # slow to import

        nncf.set_log_level(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=stores_fp16(manifest.precision))


def _cached(name: str, manifest: Manifest, write: Callable[[Path], None]) -> Path:
    """Return the cache's folder ``name``. A missing one is filled by ``write``, and appears whole or not at all."""
    suffix = "-fp16" if stores_fp16(manifest.precision) else "-int8" if manifest.precision == "int8" else ""
    folder = cache_folder() / "peers" / manifest.target_sha256 / f"{name}{suffix}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        write(work)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder
