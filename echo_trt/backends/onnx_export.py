"""Export of PyTorch to ONNX: standard operators and ``echo::SuperTreeAttention``, with weights as external data.

One rank of a divided network also has ``echo::AllReduce``, the sum of all ``ranks``' inputs, and ``echo::AllGather``,
all their inputs along the first axis.

The inputs of a graph are the role's (echo_trt.models.roles), the operator's ``METADATA``, ``logit_rows`` and the caches
``key_cache.0, value_cache.0, key_cache.1, ...``; the outputs are the role's.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import onnx
import torch
from onnx import defs
from onnxscript import values
from torch import Tensor, nn

from echo_trt.backends.base import COLLECTIVES, DOMAIN, METADATA, OPERATOR
from echo_trt.models.layers import Attend
from echo_trt.models.roles import Role, computed_in, feature_size
from echo_trt.models.weights import TYPES
from echo_trt.speculation.pack import BLOCK

OPSET = 23
ATTRIBUTES = ("num_kv_heads", "head_dim", "max_context", "sliding_window")


@torch.library.custom_op("echo::super_tree_attention", mutates_args=())
def _operator(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
    past_lens: Tensor, seq_begins: Tensor, block_indices: Tensor, block_begins: Tensor,
    tree_mask: Tensor, tree_mask_begins: Tensor,
    num_kv_heads: int, head_dim: int, max_context: int, sliding_window: int,
) -> Tensor:  # fmt: skip
    """Stand for the operator in a trace; super_tree_attention.reference computes it."""
    return torch.empty_like(query)


@_operator.register_fake
def _(query: Tensor, *others: object) -> Tensor:
    return torch.empty_like(query)


def export(role: Role, path: Path) -> None:
    """Write the graph to ``path`` (.onnx), its weights beside it (.onnx.data) without a second copy in memory."""
    inputs, metadata, caches = _example(role)
    cache_names = [f"{kind}_cache.{layer}" for layer in range(role.num_layers) for kind in ("key", "value")]
    auto = {0: torch.export.Dim.DYNAMIC}
    program = trace(
        _Graph(role),
        (inputs, metadata, torch.zeros(2, dtype=torch.long), caches),
        (dict.fromkeys(inputs, auto), [auto] * len(metadata), auto, [auto] * len(caches)),
        [*inputs, *METADATA, "logit_rows", *cache_names],
        list(role.outputs),
        OPSET,
        {torch.ops.echo.super_tree_attention.default: _to_onnx},
    )
    program.save(path, external_data=True)
    for value in program.model.graph.initializers.values():
        value.const_value = None  # onnxscript's rewriter keeps the last graph, whose weights would stay in memory


def trace(
    graph: nn.Module,
    example: tuple,
    dynamic_shapes: tuple,
    input_names: list[str],
    output_names: list[str],
    opset: int,
    translations: dict | None = None,
) -> torch.onnx.ONNXProgram:
    """Trace ``graph`` to ONNX on the inputs of ``example``, without the exporter's chatter."""
    register_schemas()
    collectives = {
        torch.ops.echo.all_reduce.default: lambda part, ranks: values.Opset(DOMAIN, 1).AllReduce(part, ranks=ranks),
        torch.ops.echo.all_gather.default: lambda part, ranks: values.Opset(DOMAIN, 1).AllGather(part, ranks=ranks),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        return torch.onnx.export(
            graph,
            example,
            input_names=input_names,
            output_names=output_names,
            opset_version=opset,
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=collectives | (translations or {}),
            verbose=False,
        )


def in_precision(role: Role, precision: str) -> Role:
    """Copy ``role`` to ``precision``; weights that have this type already are shared."""
    dtype = TYPES[precision]
    shared = {id(p): p for p in role.parameters() if p.dtype == dtype}
    return copy.deepcopy(role, shared).to(dtype)


class _Graph(nn.Module):
    """A role whose attention is the operator, over caches that are inputs."""

    def __init__(self, role: Role):
        super().__init__()
        self.role = role

    def forward(self, inputs: dict[str, Tensor], metadata: list[Tensor], logit_rows: Tensor, caches: list[Tensor]):
        return self.role(inputs, logit_rows, self._attend(metadata, caches))

    def _attend(self, metadata: list[Tensor], caches: list[Tensor]) -> Attend:
        network, config = self.role.network, self.role.network.config

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            pools = caches[2 * layer : 2 * layer + 2]
            attributes = config.num_kv_heads, config.head_dim, len(network.rotary.cos), config.window_of(layer)
            return torch.ops.echo.super_tree_attention(query, key, value, *pools, *metadata, *attributes)

        return attend


def _example(role: Role) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Make the tracer's inputs, of different sizes along different axes."""
    config, dtype = role.network.config, computed_in(role.network)
    inputs = {"token_ids": torch.zeros(5, dtype=torch.long), "positions": torch.arange(5)}
    if "features" in role.inputs:
        inputs["features"] = torch.zeros(2, feature_size(role), dtype=dtype)
    if "hidden" in role.inputs:
        inputs["hidden"] = torch.zeros(3, config.hidden_size, dtype=dtype)
    if "state_rows" in role.inputs:
        inputs["state_rows"] = torch.zeros(5, dtype=torch.long)
    lengths = (2, 3, 4, 3, 13, 3)
    metadata = [
        torch.zeros(n, dtype=torch.uint8 if m == "tree_mask" else torch.int32)
        for m, n in zip(METADATA, lengths, strict=True)
    ]
    # One tensor a cache: the exporter takes two uses of one tensor for one input.
    shape = 7, config.num_kv_heads, BLOCK, config.head_dim
    return inputs, metadata, [torch.zeros(shape, dtype=dtype) for _ in range(2 * role.num_layers)]


def _to_onnx(query, key, value, key_cache, value_cache, *rest):
    metadata, attributes = rest[: len(METADATA)], dict(zip(ATTRIBUTES, rest[len(METADATA) :], strict=True))
    return values.Opset(DOMAIN, 1).SuperTreeAttention(
        query, key, value, key_cache, value_cache, *metadata, **attributes
    )


def register_schemas() -> None:
    if defs.has(OPERATOR, domain=DOMAIN):
        return
    names = ("query", "key", "value", "key_cache", "value_cache", *METADATA)
    types = ["T"] * 5 + ["tensor(int32)"] * 4 + ["tensor(uint8)", "tensor(int32)"]
    _register(OPERATOR, dict(zip(names, types, strict=True)), "output", ATTRIBUTES)
    for name in COLLECTIVES:
        _register(name, {"part": "T"}, "whole", ("ranks",))


def _register(name: str, inputs: dict[str, str], output: str, attributes: tuple[str, ...]) -> None:
    """Register an operator of ours; ``inputs``: name -> type, where T is any of our float types."""
    schema = defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[defs.OpSchema.FormalParameter(i, t) for i, t in inputs.items()],
        outputs=[defs.OpSchema.FormalParameter(output, "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "activations and caches")],
        attributes=[defs.OpSchema.Attribute(a, defs.OpSchema.AttrType.INT, required=True) for a in attributes],
    )
    onnx.defs.register_schema(schema)
